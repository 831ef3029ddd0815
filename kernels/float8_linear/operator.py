"""Schema, shape rule and cost of ``xf.float8_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.fake_quantize_float.operator import OPERATOR as ROUNDING
from xformopt.kernels.float8_linear.reference import FORMAT, float8_linear
from xformopt.kernels.float_weight_linear.operator import OPERATOR as PRODUCT

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    found: torch.Tensor = PRODUCT.infer(x, weight, scale, base, bias, format=FORMAT)
    return found


def _flops(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> Any:
    return ROUNDING.flops(x, format=FORMAT) + PRODUCT.flops(x, weight)


OPERATOR = Operator(
    name="float8_linear",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? base=None, Tensor? bias=None) -> Tensor",
    reference=float8_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
