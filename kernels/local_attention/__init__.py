"""Local attention: softmax over a window of neighbours, dilated or not, and over stripes at regular distances."""

from xformopt.kernels.local_attention.reference import local_attention, local_keys

__all__ = ["local_attention", "local_keys"]
