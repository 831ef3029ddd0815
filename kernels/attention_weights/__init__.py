"""The first half of attention: how much each query takes from each key."""

from xformopt.kernels.attention.reference import attention_weights

__all__ = ["attention_weights"]
