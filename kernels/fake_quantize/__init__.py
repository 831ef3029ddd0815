"""A value rounded to a few levels and kept in floating point: quantization that is simulated."""

from xformopt.kernels.fake_quantize.reference import affine_range, fake_quantize, round_through

__all__ = ["affine_range", "fake_quantize", "round_through"]
