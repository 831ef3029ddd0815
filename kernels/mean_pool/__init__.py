"""Mean over the valid tokens."""

from xformopt.kernels.mean_pool.reference import mean_pool

__all__ = ["mean_pool"]
