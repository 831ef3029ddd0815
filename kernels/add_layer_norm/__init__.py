"""A residual sum and its layer normalization in one."""

from xformopt.kernels.add_layer_norm.reference import add_layer_norm

__all__ = ["add_layer_norm"]
