"""Schema, shape rule and cost of ``xf.quantized_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.quantized_linear.reference import quantized_linear

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: "x and weight disagree on the input width")
    torch._check(scale.shape == weight.shape[:1], lambda: "scale must hold one number per output channel")
    torch._check(weight.dtype == torch.int8, lambda: "the weight must be int8")
    torch._check((x_scale is None) == (x_zero is None), lambda: "x_scale and x_zero go together")
    torch._check(x_zero is None or x_zero.dtype == torch.uint8, lambda: "x_zero must be uint8")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _flops(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> Any:
    return 2 * x.numel() * weight.shape[0]


OPERATOR = Operator(
    name="quantized_linear",
    schema=(
        "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? x_scale=None, Tensor? x_zero=None)"
        " -> Tensor"
    ),
    reference=quantized_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
