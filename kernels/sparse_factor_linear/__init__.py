"""A linear layer whose weight is a product of a sparse matrix and a small dense one."""

from xformopt.kernels.sparse_factor_linear.reference import sparse_factor_linear

__all__ = ["sparse_factor_linear"]
