"""Schema, shape rule and cost of ``xf.log_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.log_attention.reference import log_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    level_scale: torch.Tensor,
    *_: Any,
    heads: int,
    kv_heads: int,
    bits: int,
    numerator: int,
    denominator: int,
    **__: Any,
) -> torch.Tensor:
    torch._check(2 <= bits <= 8, lambda: "a code has 2 to 8 bits")
    torch._check(level_scale.dim() == 0, lambda: "level_scale must be a scalar")
    torch._check(numerator >= 1, lambda: "the base must be larger than 1")
    torch._check(denominator >= 1, lambda: "the denominator must be positive")
    torch._check(q.shape[2] // heads * kv_heads == k.shape[2], lambda: "q and k disagree on the head width")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2] // kv_heads * heads)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    heads: int,
    kv_heads: int,
    bits: int,
    numerator: int,
    denominator: int,
    **__: Any,
) -> Any:
    """The logits, a logarithm for each, and one addition for each pair and channel of a value."""
    pairs = q.shape[0] * heads * q.shape[1] * k.shape[1]
    return pairs * (2 * (q.shape[2] // heads) + 16 + v.shape[2] // kv_heads)


OPERATOR = Operator(
    name="log_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor level_scale, Tensor? key_mask=None, Tensor? bias=None, "
        "Tensor? key_log_size=None, *, int heads, int kv_heads, float scale, bool causal=False, int window_left=-1, "
        "int window_right=-1, int bits, int numerator, int denominator, bool round_table=False, bool flush=True) "
        "-> Tensor"
    ),
    reference=log_attention,
    infer=_infer,
    flops=_flops,
    level="target",
)
