"""A linear layer."""

from xformopt.kernels.linear.reference import linear

__all__ = ["linear"]
