"""Schema, shape rule and cost of ``xf.prefix_scan_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.prefix_scan_attention.reference import prefix_scan_attention

__all__ = ["OPERATOR"]


def _infer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, **__: Any) -> torch.Tensor:
    torch._check(q.dim() == 1, lambda: "there is one query for all tokens: q has one axis")
    torch._check(q.shape[0] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(k.shape[1] == v.shape[1], lambda: "there is not one value for each key")
    return v.new_empty(v.shape)


def _flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, **__: Any) -> Any:
    """Logits, each chunk with itself, and chunks with those before them."""
    chunks, E = chunk_count(k.shape[1]), v.shape[2] // heads
    scans = chunks * CHUNK * CHUNK * E + chunks * chunks * (E + 1)
    return 2 * k.numel() + 2 * k.shape[0] * heads * scans


OPERATOR = Operator(
    name="prefix_scan_attention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, *, int heads, float scale) -> Tensor",
    reference=prefix_scan_attention,
    infer=_infer,
    flops=_flops,
)
