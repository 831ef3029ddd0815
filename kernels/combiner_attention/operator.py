"""Schema, shape rule and cost of ``xf.combiner_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import chunk_count
from xformopt.kernels.combiner_attention.reference import combiner_attention
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, block: int, **__: Any) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "Combiner attention has one key for each query")
    torch._check(block >= 1, lambda: "a block has at least one token")
    return v.new_empty(v.shape)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, block: int, **__: Any) -> Any:
    """Both products of each query with its own block and with every block, and of each block with its keys."""
    N = chunk_count(q.shape[1], block)
    return 2 * q.shape[0] * N * block * (block + N + 1) * (q.shape[2] + v.shape[2])


OPERATOR = Operator(
    name="combiner_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, *, int heads, float scale, int block, "
        "bool causal=False) -> Tensor"
    ),
    reference=combiner_attention,
    infer=_infer,
    flops=_flops,
)
