"""Schema, shape rule and cost of ``xf.hamming_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.hamming_attention.reference import hamming_attention
from xformopt.kernels.packing import packed_size

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    bits: int,
    causal: bool = False,
    **_: Any,
) -> torch.Tensor:
    width = heads * packed_size(bits, 1)
    for name, codes in (("q", q), ("k", k)):
        torch._check(codes.dtype == torch.uint8, lambda name=name: f"{name} must be packed bits, uint8")
        torch._check(codes.shape[2] == width, lambda name=name: f"{name} must hold {bits} bits for each head")
    torch._check(not causal or q.shape[1] == k.shape[1], lambda: "causal attention has one key for each query")
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: Any = None, *, heads: int, bits: int, **_: Any
) -> Any:
    """One addition for each bit of a key and of a query, and each channel of a value and the number beside them."""
    return q.shape[0] * (q.shape[1] + k.shape[1]) * bits * (v.shape[2] + heads)


OPERATOR = Operator(
    name="hamming_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, *, int heads, int bits, bool causal=False, "
        "float eps=1e-06) -> Tensor"
    ),
    reference=hamming_attention,
    infer=_infer,
    flops=_flops,
)
