"""Schema, shape rule and cost of ``xf.linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.linear.reference import linear

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: "x and weight disagree on the input width")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return 2 * x.numel() * weight.shape[0]


OPERATOR = Operator(
    name="linear",
    schema="(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    reference=linear,
    infer=_infer,
    flops=_flops,
)
