"""Softmax attention on ``[B, T, C]`` tensors: multi-head, grouped-query, cross; masked, biased, windowed."""

from xformopt.kernels.attention.reference import attention, attention_values, attention_weights, visible_keys

__all__ = ["attention", "attention_values", "attention_weights", "visible_keys"]
