"""Block-sparse attention: softmax over the blocks of keys that a fixed mask gives to each block of queries."""

from xformopt.kernels.block_sparse_attention.reference import block_sparse_attention

__all__ = ["block_sparse_attention"]
