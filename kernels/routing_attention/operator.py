"""Schema, shape rule and cost of ``xf.routing_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.routing_attention.reference import cluster_size, routing_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    centroids: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "routing attention has one key for each query")
    torch._check(
        centroids.dim() == 3 and centroids.shape[0] == heads and centroids.shape[2] * heads == q.shape[2],
        lambda: "the centroids must be those of each head, as wide as its queries",
    )
    torch._check(centroids.shape[1] > 0, lambda: "there must be a cluster at least")
    if bias is not None:
        torch._check(bias.dim() == 4, lambda: "the bias must have four axes: batch, heads, queries, keys")
        torch._check(bias.shape[2] == q.shape[1], lambda: "the bias and q disagree on the queries")
        torch._check(bias.shape[3] == k.shape[1], lambda: "the bias and k disagree on the keys")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, centroids: torch.Tensor, *_: Any, causal: bool = False, **__: Any
) -> Any:
    """Both products inside of each cluster, and those with the centroids."""
    B, T, width = q.shape
    C = centroids.shape[1]
    routed = (1 if causal else 2) * T * C * width
    return 2 * B * (routed + C * cluster_size(T, C) ** 2 * (width + v.shape[2]))


OPERATOR = Operator(
    name="routing_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor centroids, Tensor? key_mask=None, Tensor? bias=None, *, int heads, "
        "float scale, bool causal=False) -> Tensor"
    ),
    reference=routing_attention,
    infer=_infer,
    flops=_flops,
)
