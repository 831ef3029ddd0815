"""A parameter of any shape stored in blocks of few-bit integers, each block with a power of two for a scale."""

from xformopt.kernels.block_parameter.reference import block_parameter

__all__ = ["block_parameter"]
