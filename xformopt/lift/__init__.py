"""Lifting: from what torch.export leaves (ATen) to the xf dialect, by what is computed, not by names."""

from __future__ import annotations

from xformopt.lift.rules import lifting_rules

__all__ = ["lifting_rules"]
