"""Schema, shape rule and cost of ``xf.fake_quantize_float``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.fake_quantize_float.reference import fake_quantize_float
from xformopt.kernels.float_formats import FORMATS

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, *, format: str) -> torch.Tensor:
    torch._check(format in FORMATS, lambda: f"format must be one of {', '.join(FORMATS)}")
    return torch.empty_like(x)


def _flops(x: torch.Tensor, *, format: str) -> Any:
    """Size, maximum, two bounds, two divisions, rounding and two products."""
    return 9 * x.numel()


OPERATOR = Operator(
    name="fake_quantize_float",
    schema="(Tensor x, *, str format) -> Tensor",
    reference=fake_quantize_float,
    infer=_infer,
    flops=_flops,
    level="target",
)
