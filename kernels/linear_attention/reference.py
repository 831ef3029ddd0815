"""The definitions of linear attention: by states (the operator), masked and recurrent."""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.chunks import CHUNK, from_chunks, in_chunks, join_heads, split_heads
from xformopt.kernels.features import feature_map

__all__ = ["linear_attention", "linear_attention_masked", "linear_attention_step"]


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``phi(q) (phi(k)^T v) / (phi(q) . sum phi(k) + eps)`` per head (Katharopoulos et al., arXiv 2006.16236).

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, S, heads * D]``; causal attention has ``S = T``.
        v: Values, ``[B, S, heads * E]``.
        key_mask: Which keys exist, ``[B, S]`` bool (True: attend).
        projection: The matrix of the feature maps that have one, ``[heads, D, m]``.
        heads: Number of heads.
        feature: The map ``phi``: ``elu``, ``positive``, ``hedgehog`` (see ``kernels/features.py``), or ``given`` where
            q and k are features already.
        causal: A token attends to itself and to those before it.
        normalize: Whether the sum of weights divides the result.
        eps: Added to that sum.
        chunk: Tokens of causal attention that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``.

    """
    T, E = q.shape[1], v.shape[2] // heads
    q, k, v = _features(q, k, v, key_mask, projection, heads, feature)
    # a value of one beside the others sums up the weights themselves
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1) if normalize else v  # [B, H, S, E + 1]
    if causal:
        q, k, v = (in_chunks(x, chunk) for x in (q, k, v))  # [B, H, N, C, .]
        added = k.transpose(-1, -2) @ v  # [B, H, N, D, E]
        before = functional.pad(added.cumsum(2), (0, 0, 0, 0, 1, -1))
        summed = from_chunks((q @ k.transpose(-1, -2)).tril() @ v + q @ before, T)
    else:
        summed = q @ (k.transpose(-1, -2) @ v)
    return join_heads(summed[..., :E] / (summed[..., E:] + eps) if normalize else summed)


def _features(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    projection: torch.Tensor | None,
    heads: int,
    feature: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features of queries and keys and the values, heads apart; keys that do not exist are zero."""
    if projection is None:
        # elementwise, so that heads need not be apart
        queries, keys = (split_heads(feature_map(x, feature, None), heads) for x in (q, k))
    else:
        queries, keys = (feature_map(split_heads(x, heads), feature, projection) for x in (q, k))
    features = keys if key_mask is None else keys.masked_fill(~key_mask[:, None, :, None], 0.0)
    return queries, features, split_heads(v, heads)


def linear_attention_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The form of attention: all weights ``phi(q) phi(k)^T``, masked, each row divided by its sum; quadratic in T."""
    q, k, v = _features(q, k, v, key_mask, projection, heads, feature)
    weights = q @ k.transpose(-1, -2)  # [B, H, T, S]
    if causal:
        weights = weights.tril()
    return join_heads(weights / (weights.sum(-1, keepdim=True) + eps) @ v if normalize else weights @ v)


def linear_attention_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of causal attention, ``[B, heads * D]``, to the next state and ``[B, heads * E]``.

    The state is ``[B, heads, F, E + 1]`` for F features, its last column the sum of key features; ``E`` wide without
    normaliser.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # [B, H, D or E]
    q, k = (feature_map(x.unsqueeze(2), feature, projection).squeeze(2) for x in (q, k))  # [B, H, F]
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1) if normalize else v
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    summed = (q.unsqueeze(-2) @ state).squeeze(-2)
    return state, (summed[..., :-1] / (summed[..., -1:] + eps) if normalize else summed).flatten(1)
