"""A linear layer whose products are of 8-bit floating-point numbers."""

from xformopt.kernels.float8_linear.reference import float8_linear

__all__ = ["float8_linear"]
