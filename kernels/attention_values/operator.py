"""Schema, shape rule and cost of ``xf.attention_values``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention_values.reference import attention_values
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(weights: torch.Tensor, v: torch.Tensor, *, heads: int, kv_heads: int) -> torch.Tensor:
    torch._check(weights.shape[1] == heads, lambda: "weights must hold one matrix per head")
    torch._check(weights.shape[3] == v.shape[1], lambda: "weights and v disagree on the number of keys")
    return v.new_empty(weights.shape[0], weights.shape[2], v.shape[2] // kv_heads * heads)


def _flops(weights: torch.Tensor, v: torch.Tensor, *, heads: int, kv_heads: int) -> Any:
    return 2 * weights.numel() * (v.shape[2] // kv_heads)


OPERATOR = Operator(
    name="attention_values",
    schema="(Tensor weights, Tensor v, *, int heads, int kv_heads) -> Tensor",
    reference=attention_values,
    infer=_infer,
    flops=_flops,
    level="target",
)
