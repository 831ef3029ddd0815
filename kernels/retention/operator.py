"""Schema, shape rule and cost of ``xf.retention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.retention.reference import retention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, *, heads: int, scale: float = 1.0
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(log_decay.shape[0] == heads, lambda: "there is not one decay for each head")
    return v.new_empty(v.shape)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, **__: Any) -> Any:
    """Chunkwise: both products inside of each chunk, adding to its state and reading the one before it."""
    tokens = q.shape[0] * chunk_count(q.shape[1]) * CHUNK
    D, E = q.shape[2] // heads, v.shape[2] // heads
    return 2 * tokens * heads * (CHUNK * (D + E) + 2 * D * E)


OPERATOR = Operator(
    name="retention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, *, int heads, float scale=1.0) -> Tensor",
    reference=retention,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
