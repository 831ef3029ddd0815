"""Layer normalization, over the whole width or over groups (heads) of it."""

from xformopt.kernels.layer_norm.reference import layer_norm

__all__ = ["layer_norm"]
