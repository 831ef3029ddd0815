"""A weight rounded to two or three values and kept in floating point, so that it can be trained."""

from xformopt.kernels.ternary_weight.reference import statistics, ternary_weight

__all__ = ["statistics", "ternary_weight"]
