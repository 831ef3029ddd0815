"""Schema, shape rule and cost of ``xf.delta_rule``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.delta_rule.reference import delta_rule

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, *, heads: int, scale: float = 1.0
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(beta.shape[2] == heads, lambda: "there is not one beta for each head")
    return v.new_empty(v.shape)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, **__: Any) -> Any:
    """Chunkwise: products of keys and of queries with keys, the triangular system (half), and three with the state."""
    tokens = q.shape[0] * chunk_count(q.shape[1]) * CHUNK
    D, E = q.shape[2] // heads, v.shape[2] // heads
    return tokens * heads * (4 * CHUNK * D + CHUNK * (D + E) + 2 * CHUNK * E + 6 * D * E)


OPERATOR = Operator(
    name="delta_rule",
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, *, int heads, float scale=1.0) -> Tensor",
    reference=delta_rule,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
