"""Pointwise activation functions of transformers."""

from xformopt.kernels.activation.reference import FUNCTIONS, activation

__all__ = ["FUNCTIONS", "activation"]
