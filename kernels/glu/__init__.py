"""Gated linear unit: an activated gate times a value."""

from xformopt.kernels.glu.reference import glu

__all__ = ["glu"]
