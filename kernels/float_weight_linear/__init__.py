"""A linear layer whose weight is stored in floating point of few bits and multiplied in the precision of its input."""

from xformopt.kernels.float_weight_linear.reference import float_weight_linear

__all__ = ["float_weight_linear"]
