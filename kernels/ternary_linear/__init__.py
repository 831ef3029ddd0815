"""A linear layer whose weights have two or three values."""

from xformopt.kernels.ternary_linear.reference import LEVELS, ternary_linear

__all__ = ["LEVELS", "ternary_linear"]
