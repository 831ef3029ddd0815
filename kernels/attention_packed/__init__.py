"""Softmax attention inside each of the sequences that lie one after another without padding."""

from xformopt.kernels.attention_packed.reference import attention_packed

__all__ = ["attention_packed"]
