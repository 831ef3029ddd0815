"""Schema, shape rule and cost of ``xf.attention_received``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention_received.reference import attention_received
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(q: torch.Tensor, k: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any) -> torch.Tensor:
    torch._check(q.shape[2] // heads * kv_heads == k.shape[2], lambda: "q and k disagree on the head width")
    return k.new_empty(k.shape[0], k.shape[1])


def _flops(q: torch.Tensor, k: torch.Tensor, *_: Any, heads: int, first: int = 0, **__: Any) -> Any:
    """The product of queries and keys, the softmax and the mean."""
    pairs = q.shape[0] * (first or q.shape[1]) * k.shape[1]
    return 2 * pairs * q.shape[2] + 9 * pairs * heads


OPERATOR = Operator(
    name="attention_received",
    schema=(
        "(Tensor q, Tensor k, Tensor? key_mask=None, Tensor? key_log_size=None, *, int heads, int kv_heads, "
        "float scale, int first=0) -> Tensor"
    ),
    reference=attention_received,
    infer=_infer,
    flops=_flops,
)
