"""The definition of a linear layer whose products are of 8-bit floating-point numbers.

    s = max|x| / 448 of each token,   y = s round(x / s) W^T + b,   W = values[codes] * scale

Both factors are E4M3 (Micikevicius et al., arXiv 2209.05433).
"""

from __future__ import annotations

import torch

from xformopt.kernels.fake_quantize_float.reference import fake_quantize_float
from xformopt.kernels.float_weight_linear.reference import float_weight_linear

__all__ = ["FORMAT", "float8_linear"]

FORMAT = "fp8_e4m3"


def float8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``xf.float_weight_linear`` of ``xf.fake_quantize_float(x)``, both in E4M3: operands as there."""
    return float_weight_linear(fake_quantize_float(x, format=FORMAT), weight, scale, base, bias, format=FORMAT)
