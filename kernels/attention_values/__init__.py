"""The second half of attention: the values summed by given weights."""

from xformopt.kernels.attention.reference import attention_values

__all__ = ["attention_values"]
