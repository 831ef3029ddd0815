"""The definitions of linear attention: by states (the operator), masked and recurrent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from xformopt.kernels.chunks import CHUNK, from_chunks, in_chunks, join_heads, split_heads

__all__ = ["FEATURES", "linear_attention", "linear_attention_masked", "linear_attention_step"]

# what is done to queries and keys first; "given": the caller did it
FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "elu": lambda x: functional.elu(x) + 1,
    "given": lambda x: x,
}


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
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
        heads: Number of heads.
        feature: ``elu`` for ``phi(x) = elu(x) + 1``; ``given`` where q and k are features already.
        causal: A token attends to itself and to those before it.
        normalize: Whether the sum of weights divides the result.
        eps: Added to that sum.
        chunk: Tokens of causal attention that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``.

    """
    T, E = q.shape[1], v.shape[2] // heads
    q, k, v = _features(q, k, v, key_mask, heads, feature)
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, heads: int, feature: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features of queries and keys and the values, heads apart; keys that do not exist are zero."""
    phi = FEATURES[feature]
    features = phi(k) if key_mask is None else phi(k).masked_fill(~key_mask.unsqueeze(-1), 0.0)
    return split_heads(phi(q), heads), split_heads(features, heads), split_heads(v, heads)


def linear_attention_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The form of attention: all weights ``phi(q) phi(k)^T``, masked, each row divided by its sum; quadratic in T."""
    q, k, v = _features(q, k, v, key_mask, heads, feature)
    weights = q @ k.transpose(-1, -2)  # [B, H, T, S]
    if causal:
        weights = weights.tril()
    return join_heads(weights / (weights.sum(-1, keepdim=True) + eps) @ v if normalize else weights @ v)


def linear_attention_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    feature: str = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of causal attention, ``[B, heads * D]``, to the next state and ``[B, heads * E]``.

    The state is ``[B, heads, D, E + 1]``, its last column the sum of key features; ``E`` wide without normaliser.
    """
    phi = FEATURES[feature]
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (phi(q), phi(k), v))  # [B, H, D or E]
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1) if normalize else v
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    summed = (q.unsqueeze(-2) @ state).squeeze(-2)
    return state, (summed[..., :-1] / (summed[..., -1:] + eps) if normalize else summed).flatten(1)
