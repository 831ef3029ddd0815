"""Image to tokens: one linear map of every patch."""

from xformopt.kernels.patch_embedding.reference import patch_embedding

__all__ = ["patch_embedding"]
