"""Schema, shape rule and cost of ``xf.attention_packed``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention_packed.reference import attention_packed
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any
) -> torch.Tensor:
    torch._check(q.shape[2] // heads * kv_heads == k.shape[2], lambda: "q and k disagree on the head width")
    return q.new_empty(1, q.shape[1], v.shape[2] // kv_heads * heads)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    *_: Any,
    heads: int,
    kv_heads: int,
    **__: Any,
) -> Any:
    """Both matmuls over all pairs, where all sequences are equally long: how long each one is only the data say."""
    tokens, sequences = q.shape[1], offsets.shape[0] - 1
    return 2 * tokens * tokens * (q.shape[2] + v.shape[2] // kv_heads * heads) // max(sequences, 1)


OPERATOR = Operator(
    name="attention_packed",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? keys=None, *, "
        "int heads, int kv_heads, float scale, bool causal=False) -> Tensor"
    ),
    reference=attention_packed,
    infer=_infer,
    flops=_flops,
    level="target",
)
