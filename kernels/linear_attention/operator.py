"""Schema, shape rule and cost of ``xf.linear_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.features import FEATURES, PROJECTED, feature_width
from xformopt.kernels.linear_attention.reference import linear_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(feature in FEATURES, lambda: f"feature {feature!r} is not one of {', '.join(FEATURES)}")
    needs = feature in PROJECTED
    torch._check(
        needs == (projection is not None), lambda: f"feature {feature!r} has {'a' if needs else 'no'} projection"
    )
    if projection is not None:
        shape = (heads, q.shape[2] // heads)
        torch._check(projection.shape[:2] == shape, lambda: "projection and q disagree on the heads or their width")
    torch._check(not causal or q.shape[1] == k.shape[1], lambda: "causal attention has one key for each query")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    **_: Any,
) -> Any:
    """Projections, the state of all keys and its reading; where causal, both products inside of each chunk instead."""
    D, E = feature_width(feature, q.shape[2] // heads, projection), v.shape[2] // heads
    projected = 0 if projection is None else 2 * (q.numel() + k.numel()) * projection.shape[2]
    if not causal:
        return projected + 2 * q.shape[0] * heads * (q.shape[1] + k.shape[1]) * D * E
    tokens = q.shape[0] * chunk_count(q.shape[1]) * CHUNK
    return projected + 2 * tokens * heads * (CHUNK * (D + E) + 2 * D * E)


OPERATOR = Operator(
    name="linear_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? projection=None, *, int heads, "
        "str feature='elu', bool causal=False, bool normalize=True, float eps=1e-06) -> Tensor"
    ),
    reference=linear_attention,
    infer=_infer,
    flops=_flops,
)
