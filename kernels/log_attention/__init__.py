"""Softmax attention whose weights are rounded to a few powers of a base."""

from xformopt.kernels.log_attention.reference import log_attention

__all__ = ["log_attention"]
