"""A linear layer and its activation in one."""

from xformopt.kernels.linear_activation.reference import linear_activation

__all__ = ["linear_activation"]
