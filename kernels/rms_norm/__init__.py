"""Root-mean-square normalization, over the whole width or over groups (heads) of it."""

from xformopt.kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
