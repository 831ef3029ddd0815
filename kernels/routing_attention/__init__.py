"""Routing attention: queries and keys meet in clusters of equal size."""

from xformopt.kernels.routing_attention.reference import cluster_size, route, routing_attention

__all__ = ["cluster_size", "route", "routing_attention"]
