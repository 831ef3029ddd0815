"""A linear layer whose weight is stored in few bits and multiplied in floating point."""

from xformopt.kernels.weight_only_linear.reference import weight_only_linear

__all__ = ["weight_only_linear"]
