"""Schema, shape rule and cost of ``xf.flow_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.flow_attention.reference import flow_attention

__all__ = ["OPERATOR"]

# of one channel of queries and keys: two sums, two products with sums, one division
_FLOW = 7


def _infer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, causal: bool = False, **__: Any
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(not causal or q.shape[1] == k.shape[1], lambda: "causal attention has one key for each query")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, causal: bool = False, **__: Any
) -> Any:
    """The flows of all channels, and linear attention."""
    D, E = q.shape[2] // heads, v.shape[2] // heads
    flows = _FLOW * (q.numel() + k.numel())
    if not causal:
        return flows + 2 * q.shape[0] * heads * (q.shape[1] + k.shape[1]) * D * E
    tokens = q.shape[0] * chunk_count(q.shape[1]) * CHUNK
    return flows + 2 * tokens * heads * (CHUNK * (D + E) + 2 * D * E)


OPERATOR = Operator(
    name="flow_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? query_mask=None, *, int heads, "
        "bool causal=False, float eps=1e-06) -> Tensor"
    ),
    reference=flow_attention,
    infer=_infer,
    flops=_flops,
)
