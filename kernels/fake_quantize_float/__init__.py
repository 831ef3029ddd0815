"""A value rounded to a floating-point format of few bits, with a scale for each token, and kept as it was stored."""

from xformopt.kernels.fake_quantize_float.reference import fake_quantize_float

__all__ = ["fake_quantize_float"]
