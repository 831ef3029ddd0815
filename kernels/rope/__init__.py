"""Rotary position embedding."""

from xformopt.kernels.rope.reference import rope

__all__ = ["rope"]
