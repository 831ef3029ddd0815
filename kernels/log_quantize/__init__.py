"""A value rounded to a few powers of a base and kept in floating point: logarithmic quantization, simulated."""

from xformopt.kernels.log_quantize.reference import log_levels, log_quantize, log_table

__all__ = ["log_levels", "log_quantize", "log_table"]
