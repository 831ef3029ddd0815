"""A linear layer in 8-bit integers."""

from xformopt.kernels.quantized_linear.reference import dynamic_range, quantize_activation, quantized_linear

__all__ = ["dynamic_range", "quantize_activation", "quantized_linear"]
