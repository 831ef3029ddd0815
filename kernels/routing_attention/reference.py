"""The definition of routing attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.chunks import join_heads, split_heads
from xformopt.kernels.masked_softmax import divided, masked_softmax

__all__ = ["EPS", "cluster_size", "route", "routing_attention"]

# of the layer norm before routing
EPS = 1e-5


def cluster_size(T: int, clusters: int) -> int:
    """Return how many queries and keys of ``T`` tokens each cluster takes: ``T / clusters``, rounded up."""
    return -(-T // clusters)


def route(x: torch.Tensor) -> torch.Tensor:
    """Return vectors ``[..., D]`` as they are compared with centroids: layer-normed, without affine."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPS)


def routing_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    centroids: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """Attention inside balanced clusters: Routing Transformer (Roy et al., TACL 2021, arXiv 2003.05997, algorithm 1).

    Each centroid takes the ``w = T / C`` queries and the ``w`` keys whose layer-normed vectors have the largest
    products with it, and the queries attend to the keys of their cluster.  So all clusters are of one size; a token
    may be in several, of which it gets the mean, or in none.  One cluster is attention itself.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        centroids: ``[heads, C, D]``, for queries and keys alike.
        key_mask: Which tokens exist, ``[B, T]`` bool (True: attend); those that do not are taken last.
        bias: Added to the scaled logits, ``[1 or B, 1 or heads, T, T]``.
        heads: Number of heads.
        scale: Factor of the logits.
        causal: Query ``i`` sees no key after ``i``, and tokens are routed by their queries alone, so that each meets
            its own key.  Which tokens a cluster takes depends on later ones even then.

    Returns:
        ``[B, T, heads * E]``.  A query that is in no cluster, or sees no key in its clusters, gets zeros.

    """
    B, T = q.shape[:2]
    exists = key_mask if key_mask is not None else torch.ones(B, T, dtype=torch.bool, device=q.device)
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    queries = _members(q, centroids, exists)  # [B, H, C, w]
    keys = queries if causal else _members(k, centroids, exists)
    logits = scale * _take(q, queries) @ _take(k, keys).transpose(-1, -2)  # [B, H, C, w, w]
    if bias is not None:
        pairs = queries.unsqueeze(-1) * T + keys.unsqueeze(-2)
        logits = logits + bias.expand(B, heads, T, T).flatten(2).gather(2, pairs.flatten(2)).view_as(logits)
    visible = _take(exists[:, None, :, None].expand(B, heads, T, 1), keys).transpose(-1, -2)  # [B, H, C, 1, w]
    if causal:
        visible = visible & (keys.unsqueeze(-2) <= queries.unsqueeze(-1))
    attended = masked_softmax(logits, visible) @ _take(v, keys)  # [B, H, C, w, E]
    # clusters in which a query sees nothing have no part in its mean
    sees = visible.any(-1, keepdim=True).to(v.dtype).expand(*queries.shape, 1)
    total, count = (
        x.new_zeros(B, heads, T, x.shape[-1]).scatter_add(2, _rows(queries, x.shape[-1]), x.flatten(2, 3))
        for x in (attended, sees)
    )
    return join_heads(divided(total, count))


def _members(x: torch.Tensor, centroids: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return which tokens of ``[B, H, T, D]`` each cluster takes, ``[B, H, C, w]``; of equal ones, the first."""
    products = centroids @ route(x.detach()).transpose(-1, -2)  # [B, H, C, T]
    products = products.masked_fill(~exists[:, None, None], float("-inf"))
    size = cluster_size(x.shape[2], centroids.shape[1])
    return products.sort(dim=-1, descending=True, stable=True).indices[..., :size]


def _take(x: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Return the rows of ``[B, H, T, N]`` that each cluster takes, ``[B, H, C, w, N]``."""
    taken: torch.Tensor = x.gather(2, _rows(members, x.shape[-1])).unflatten(2, members.shape[2:])
    return taken


def _rows(members: torch.Tensor, width: int) -> torch.Tensor:
    """Return ``[B, H, C, w]`` as indices of whole rows, ``[B, H, C * w, width]``."""
    return members.flatten(2).unsqueeze(-1).expand(-1, -1, -1, width)
