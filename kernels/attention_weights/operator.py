"""Schema, shape rule and cost of ``xf.attention_weights``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention_weights.reference import attention_weights
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(q: torch.Tensor, k: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any) -> torch.Tensor:
    torch._check(q.shape[2] // heads * kv_heads == k.shape[2], lambda: "q and k disagree on the head width")
    return q.new_empty(q.shape[0], heads, q.shape[1], k.shape[1])


def _flops(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> Any:
    """The matmul over all pairs; masks save none of them here."""
    return 2 * q.numel() * k.shape[1]


OPERATOR = Operator(
    name="attention_weights",
    schema=(
        "(Tensor q, Tensor k, Tensor? key_mask=None, Tensor? bias=None, Tensor? key_log_size=None, *, "
        "int heads, int kv_heads, float scale, bool causal=False, int window_left=-1, int window_right=-1) -> Tensor"
    ),
    reference=attention_weights,
    infer=_infer,
    flops=_flops,
    level="target",
)
