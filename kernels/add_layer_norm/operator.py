"""Schema, shape rule and cost of ``xf.add_layer_norm``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.add_layer_norm.reference import add_layer_norm
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, residual: torch.Tensor, *_: Any, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty_like(x + residual)
    return torch.empty_like(total), total


def _flops(x: torch.Tensor, *_: Any, **__: Any) -> Any:
    """The norm by the convention of ``xf.layer_norm``, and the sum."""
    return 9 * x.numel()


OPERATOR = Operator(
    name="add_layer_norm",
    schema="(Tensor x, Tensor residual, Tensor? weight=None, Tensor? bias=None, *, float eps) -> (Tensor, Tensor)",
    reference=add_layer_norm,
    infer=_infer,
    flops=_flops,
    level="target",
)
