"""Schema, shape rule and cost of ``xf.delta_rule_resumed``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.delta_rule.operator import OPERATOR as RULE
from xformopt.kernels.delta_rule_resumed.reference import delta_rule_resumed

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    expected = (v.shape[0], heads, k.shape[2] // heads, v.shape[2] // heads)
    torch._check(state.shape == expected, lambda: "the state is not one matrix of a key by a value for each head")
    return RULE.infer(q, k, v, beta, heads=heads, scale=scale), state.new_empty(state.shape)


def _flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, state: torch.Tensor, **options: Any
) -> Any:
    return RULE.flops(q, k, v, beta, **options)


OPERATOR = Operator(
    name="delta_rule_resumed",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor state, *, int heads, float scale=1.0) -> (Tensor, Tensor)"
    ),
    reference=delta_rule_resumed,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
