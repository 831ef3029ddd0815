"""Schema, shape rule and cost of ``xf.gated_linear_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.gated_linear_attention.reference import gated_linear_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gate: torch.Tensor, *, heads: int, scale: float = 1.0
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(log_gate.shape[2] == k.shape[2], lambda: "there is not one gate for each channel of the keys")
    return v.new_empty(v.shape)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, **__: Any) -> Any:
    """Chunkwise: a query with each key of its chunk up to its own, adding to the states and reading them."""
    tokens = q.shape[0] * chunk_count(q.shape[1]) * CHUNK
    D, E = q.shape[2] // heads, v.shape[2] // heads
    return 2 * tokens * heads * ((CHUNK + 1) * (D + E) // 2 + 2 * D * E)


OPERATOR = Operator(
    name="gated_linear_attention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_gate, *, int heads, float scale=1.0) -> Tensor",
    reference=gated_linear_attention,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
