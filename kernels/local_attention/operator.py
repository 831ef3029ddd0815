"""Schema, shape rule and cost of ``xf.local_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.local_attention.reference import local_attention

__all__ = ["OPERATOR", "queries_together"]

_FEWEST, _MOST = 16, 64


def queries_together(window_left: int, window_right: int) -> int:
    """Return how many queries share the keys that are gathered for them: about as many as a window has keys."""
    return min(max(1 << (window_left + window_right).bit_length(), _FEWEST), _MOST)


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    window_left: int,
    window_right: int = 0,
    dilation: int = 1,
    stripe: int = 0,
    causal: bool = False,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "local attention has one key for each query")
    torch._check(window_left >= 0 and window_right >= 0, lambda: "a window has a bound on each side, not below 0")
    torch._check(not causal or window_right == 0, lambda: "a causal window has no keys on its right")
    torch._check(dilation >= 1 and stripe >= 0, lambda: "dilation is at least 1, and stripe at least 0")
    if bias is not None:
        torch._check(bias.dim() == 4, lambda: "the bias must have four axes: batch, heads, queries, keys")
        torch._check(bias.shape[2] == q.shape[1], lambda: "the bias and q disagree on the queries")
        torch._check(bias.shape[3] == k.shape[1], lambda: "the bias and k disagree on the keys")
        torch._check(dilation == 1 and not stripe, lambda: "a window with a bias has neither dilation nor stripes")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    heads: int,
    window_left: int,
    window_right: int = 0,
    dilation: int = 1,
    stripe: int = 0,
    **__: Any,
) -> Any:
    """Both products of each group of queries with all keys that one of them sees, and of stripes with themselves."""
    B, T = q.shape[0], q.shape[1]
    C = queries_together(window_left, window_right)
    pairs = chunk_count(T, C * dilation) * C * dilation * (C + window_left + window_right)
    if stripe:
        pairs = pairs + stripe * chunk_count(T, stripe) ** 2
    return 2 * B * pairs * (q.shape[2] + v.shape[2])


OPERATOR = Operator(
    name="local_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, *, int heads, float scale, "
        "int window_left, int window_right=0, int dilation=1, int stripe=0, bool causal=False) -> Tensor"
    ),
    reference=local_attention,
    infer=_infer,
    flops=_flops,
)
