"""Combiner attention: a token's own block key by key, every other block through what stands for it."""

from xformopt.kernels.combiner_attention.reference import combiner_attention

__all__ = ["combiner_attention"]
