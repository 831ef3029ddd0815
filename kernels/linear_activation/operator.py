"""Schema, shape rule and cost of ``xf.linear_activation``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.linear_activation.reference import linear_activation

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> torch.Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: "x and weight disagree on the input width")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> Any:
    elements = x.numel() // x.shape[-1] * weight.shape[0]
    return 2 * x.numel() * weight.shape[0] + elements * (1 if function == "relu" else 8)


OPERATOR = Operator(
    name="linear_activation",
    schema="(Tensor x, Tensor weight, Tensor? bias=None, *, str function) -> Tensor",
    reference=linear_activation,
    infer=_infer,
    flops=_flops,
    level="target",
)
