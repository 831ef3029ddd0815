"""A residual sum and its RMS normalization in one."""

from xformopt.kernels.add_rms_norm.reference import add_rms_norm

__all__ = ["add_rms_norm"]
