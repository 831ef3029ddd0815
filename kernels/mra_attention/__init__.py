"""Multi-resolution attention: exact where it matters, by the means of blocks elsewhere."""

from xformopt.kernels.mra_attention.reference import mra_attention

__all__ = ["mra_attention"]
