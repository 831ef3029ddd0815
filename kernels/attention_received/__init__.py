"""How much attention each token gets."""

from xformopt.kernels.attention_received.reference import attention_received

__all__ = ["attention_received"]
