"""Analyses: pure functions of a Program."""

from __future__ import annotations

from xformopt.analysis.cost import Cost, NodeCost, cost
from xformopt.analysis.outlier_tokens import Defect, Opaque, outlier_tokens

__all__ = ["Cost", "Defect", "NodeCost", "Opaque", "cost", "outlier_tokens"]
