"""A table of embeddings stored in few bits."""

from xformopt.kernels.quantized_embedding.reference import quantized_embedding

__all__ = ["quantized_embedding"]
