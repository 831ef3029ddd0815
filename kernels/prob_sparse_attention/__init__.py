"""ProbSparse attention: the queries that are farthest from uniform attend, all others get the mean of the values."""

from xformopt.kernels.prob_sparse_attention.reference import active_queries, prob_sparse_attention

__all__ = ["active_queries", "prob_sparse_attention"]
