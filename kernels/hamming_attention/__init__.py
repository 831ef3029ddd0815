"""Linear attention whose queries and keys are binary codes."""

from xformopt.kernels.hamming_attention.reference import hamming_attention

__all__ = ["hamming_attention"]
