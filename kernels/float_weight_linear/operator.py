"""Schema, shape rule and cost of ``xf.float_weight_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.float_formats import FORMATS
from xformopt.kernels.float_weight_linear.reference import float_weight_linear

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    format: str,
) -> torch.Tensor:
    torch._check(format in FORMATS, lambda: f"format must be one of {', '.join(FORMATS)}")
    rows, groups, size = weight.shape
    fills = groups * size * 8 == x.shape[-1] * FORMATS[format].bits
    torch._check(fills, lambda: "x and weight disagree on the input width")
    torch._check(scale.shape == (rows, groups), lambda: "scale must hold one number per output channel and group")
    torch._check(base is None or scale.dtype == torch.uint8, lambda: "base goes together with scales in E4M3")
    return x.new_empty(*x.shape[:-1], rows)


def _flops(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * x.numel() * weight.shape[0]


OPERATOR = Operator(
    name="float_weight_linear",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? base=None, Tensor? bias=None, *, str format) -> Tensor",
    reference=float_weight_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
