"""Softmax attention on ``[B, T, C]`` tensors: multi-head, grouped-query, cross; masked, biased, windowed."""

from xformopt.kernels.attention.reference import attention, visible_keys

__all__ = ["attention", "visible_keys"]
