"""Entmax attention: weights that are exactly zero for keys far below the best."""

from xformopt.kernels.entmax_attention.reference import entmax, entmax_attention

__all__ = ["entmax", "entmax_attention"]
