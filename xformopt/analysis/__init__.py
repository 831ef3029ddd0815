"""Analyses: pure functions of a Program."""

from __future__ import annotations

from xformopt.analysis.cost import Cost, NodeCost, cost

__all__ = ["Cost", "NodeCost", "cost"]
