"""Schema, shape rule and cost of ``xf.attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention.reference import attention
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any
) -> torch.Tensor:
    torch._check(q.shape[2] // heads * kv_heads == k.shape[2], lambda: "q and k disagree on the head width")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2] // kv_heads * heads)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any) -> Any:
    """Both matmuls over all pairs; masks save none of them here."""
    pairs = q.shape[0] * q.shape[1] * k.shape[1]
    return 2 * pairs * (q.shape[2] + v.shape[2] // kv_heads * heads)


OPERATOR = Operator(
    name="attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, Tensor? key_log_size=None, *, "
        "int heads, int kv_heads, float scale, bool causal=False, int window_left=-1, int window_right=-1) -> Tensor"
    ),
    reference=attention,
    infer=_infer,
    flops=_flops,
)
