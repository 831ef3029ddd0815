"""Schema, shape rule and cost of ``xf.windowed_linear_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.features import FEATURES, PROJECTED, feature_width
from xformopt.kernels.windowed_linear_attention.reference import chunk_of, windowed_linear_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    window: int,
    feature: str = "hedgehog",
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "attention with a window has one key for each query")
    torch._check(tuple(gain.shape) == (heads,), lambda: "gain has one number for each head")
    torch._check(window >= 1, lambda: "a window has at least one key, a query's own")
    torch._check(feature in FEATURES, lambda: f"feature {feature!r} is not one of {', '.join(FEATURES)}")
    needs = feature in PROJECTED
    torch._check(
        needs == (projection is not None), lambda: f"feature {feature!r} has {'a' if needs else 'no'} projection"
    )
    if projection is not None:
        shape = (heads, q.shape[2] // heads)
        torch._check(projection.shape[:2] == shape, lambda: "projection and q disagree on the heads or their width")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    window: int,
    feature: str = "hedgehog",
    causal: bool = False,
    **_: Any,
) -> Any:
    """Projections, both kinds of weights of each chunk with those around it, and states beyond."""
    D, E, C = q.shape[2] // heads, v.shape[2] // heads, chunk_of(window)
    F = feature_width(feature, D, projection)
    projected = 0 if projection is None else 2 * (q.numel() + k.numel()) * projection.shape[2]
    around = 2 * C if causal else 3 * C
    tokens = q.shape[0] * chunk_count(q.shape[1], C) * C
    return projected + 2 * tokens * heads * (around * (D + F + E) + 2 * F * E)


OPERATOR = Operator(
    name="windowed_linear_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor gain, Tensor? key_mask=None, Tensor? projection=None, *, int heads, "
        "float scale, int window, str feature='hedgehog', bool causal=False) -> Tensor"
    ),
    reference=windowed_linear_attention,
    infer=_infer,
    flops=_flops,
)
