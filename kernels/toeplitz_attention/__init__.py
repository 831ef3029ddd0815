"""Kernelized attention with relative positions: a Toeplitz matrix multiplies the weights of linear attention."""

from xformopt.kernels.toeplitz_attention.reference import toeplitz_attention, toeplitz_attention_fft

__all__ = ["toeplitz_attention", "toeplitz_attention_fft"]
