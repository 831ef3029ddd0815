"""Merge tokens: the mean of each by size."""

from xformopt.kernels.merge_tokens.reference import merge_tokens

__all__ = ["merge_tokens"]
