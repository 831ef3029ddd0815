"""Schema, shape rule and cost of ``xf.entmax_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.entmax_attention.reference import entmax_attention, steps

__all__ = ["OPERATOR"]

# of one key in one step: above the threshold, three powers, three sums
_STEP = 9


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    alpha: float = 1.5,
    causal: bool = False,
    **__: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(1 < alpha <= 2, lambda: "alpha must be above 1 (where entmax is softmax: xf.attention) and at most 2")
    torch._check(not causal or q.shape[1] == k.shape[1], lambda: "causal attention has one key for each query")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, alpha: float = 1.5, **__: Any
) -> Any:
    """Both products over all pairs, and the steps to the threshold of each row."""
    pairs = q.shape[0] * q.shape[1] * k.shape[1]
    return pairs * (2 * (q.shape[2] + v.shape[2]) + steps(alpha) * _STEP * heads)


OPERATOR = Operator(
    name="entmax_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, *, int heads, float scale, float alpha=1.5, "
        "bool causal=False) -> Tensor"
    ),
    reference=entmax_attention,
    infer=_infer,
    flops=_flops,
)
