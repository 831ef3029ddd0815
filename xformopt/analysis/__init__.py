"""Analyses: pure functions of a Program."""

from __future__ import annotations

from xformopt.analysis.cost import Cost, NodeCost, cost, example_sizes

__all__ = ["Cost", "NodeCost", "cost", "example_sizes"]
