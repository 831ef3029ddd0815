"""The definitions of linear attention with a window: in chunks (the operator), masked and token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from xformopt.kernels.chunks import from_chunks, in_chunks, join_heads, split_heads
from xformopt.kernels.features import feature_map

__all__ = [
    "Window",
    "chunk_of",
    "windowed_linear_attention",
    "windowed_linear_attention_masked",
    "windowed_linear_attention_step",
]

_SMALLEST_CHUNK = 16


def chunk_of(window: int) -> int:
    """Return how many tokens are computed together: so many that a window reaches no further than to the next chunk."""
    return max(window, _SMALLEST_CHUNK)


def windowed_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    window: int,
    feature: str = "hedgehog",
    causal: bool = False,
) -> torch.Tensor:
    """``sum_j w_ij v_j / sum_j w_ij``: exponential weights near a query, products of features elsewhere.

    ``w_ij = exp(scale q_i . k_j + gain)`` where ``|i - j| < window``, and ``phi(q_i) . phi(k_j)`` elsewhere: the hybrid
    of sliding window and linear attention of LoLCATs (Zhang et al., arXiv 2410.10254), whose gamma is ``exp(gain)``.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        gain: Logarithm of the factor of the weights in the window, ``[heads]``.
        key_mask: Which keys exist, ``[B, T]`` bool (True: attend).
        projection: The matrix of the feature maps that have one, ``[heads, D, m]``.
        heads: Number of heads.
        scale: Factor of the logits in the window.
        window: Keys that a query sees by softmax, its own included; where not causal, on each side.
        feature: The map ``phi`` (see ``kernels/features.py``).
        causal: A token attends to itself and to those before it.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    T, C = q.shape[1], chunk_of(window)
    exists = q.new_ones(q.shape[:2]) if key_mask is None else key_mask.to(q.dtype)
    fq, fk, v = _features_and_values(q, k, v, exists, projection, heads, feature)
    q, k = (in_chunks(split_heads(x, heads), C) for x in (q * scale, k))
    fq, fk, v, present = (in_chunks(x, C) for x in (fq, fk, v, exists[:, None, :, None]))
    near, far = _kinds(C, window, causal, q.device)

    keys, features, values, present = (_around(x, causal) for x in (k, fk, v, present))  # [B, H, N, K, .]
    logits = q @ keys.transpose(-1, -2) + gain[:, None, None, None]  # [B, H, N, C, K]
    logits = logits.masked_fill(~(near & present.transpose(-1, -2).bool()), float("-inf"))
    added = fk.transpose(-1, -2) @ v  # [B, H, N, F, E + 1]
    beyond = _beyond(added) if causal else _beyond(added) + _beyond(added.flip(2)).flip(2)
    apart = (fq @ features.transpose(-1, -2) * far) @ values + fq @ beyond  # [B, H, N, C, E + 1]
    return join_heads(from_chunks(_mean(logits, values, apart), T))


def _features_and_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    exists: torch.Tensor,
    projection: torch.Tensor | None,
    heads: int,
    feature: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features and values ``[B, H, T, .]``; absent keys are zero, and a value of one sums up the weights."""
    fq, fk = (feature_map(split_heads(x, heads), feature, projection) for x in (q, k))
    v = split_heads(v, heads)
    return fq, fk * exists[:, None, :, None], torch.cat((v, torch.ones_like(v[..., :1])), -1)


def _mean(logits: torch.Tensor, values: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Return the mean of values weighed by ``exp(logits)`` and of those that were summed up apart; their sums are last.

    All weights of a row are divided by the largest: of the near ones where there are no others, which may be all small.
    """
    top = logits.detach().amax(-1, keepdim=True)
    has_others = apart[..., -1:].detach() > 0
    top = torch.where(has_others, top.clamp(min=0), top.masked_fill(top.isneginf(), 0.0))
    summed = (logits - top).exp() @ values + apart * (-top.clamp(min=0)).exp()
    return summed[..., :-1] / summed[..., -1:].clamp(min=torch.finfo(summed.dtype).tiny)


def _kinds(C: int, window: int, causal: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which keys around a chunk weigh by softmax and which by features, ``[C, K]``."""
    K = 2 * C if causal else 3 * C
    back = torch.arange(C, device=device)[:, None] + C - torch.arange(K, device=device)
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    near = back.abs() < window
    return near & seen, ~near & seen


def _around(x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Return each chunk behind the one before it, and before the one after it where not causal, ``[B, H, N, K, .]``."""
    parts = [functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x]
    if not causal:
        parts.append(functional.pad(x, (0, 0, 0, 0, 0, 1))[:, :, 1:])
    return torch.cat(parts, -2)


def _beyond(added: torch.Tensor) -> torch.Tensor:
    """Return the state of all chunks before the one before each, ``[B, H, N, F, E + 1]``."""
    return functional.pad(added, (0, 0, 0, 0, 2, 0))[:, :, : added.shape[2]].cumsum(2)


def windowed_linear_attention_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    window: int,
    feature: str = "hedgehog",
    causal: bool = False,
) -> torch.Tensor:
    """The form of attention: all weights of both kinds, each row divided by its sum; quadratic in T."""
    T = q.shape[1]
    exists = q.new_ones(q.shape[:2]) if key_mask is None else key_mask.to(q.dtype)
    fq, fk, v = _features_and_values(q, k, v, exists, projection, heads, feature)
    q, k = (split_heads(x, heads) for x in (q * scale, k))
    back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    near = seen & (back.abs() < window)
    logits = q @ k.transpose(-1, -2) + gain[:, None, None]  # [B, H, T, T]
    logits = logits.masked_fill(~(near & exists[:, None, None, :].bool()), float("-inf"))
    return join_heads(_mean(logits, v, (fq @ fk.transpose(-1, -2) * (seen & ~near)) @ v))


class Window(NamedTuple):
    """What one token hands to the next: the state of what has left the window, and what is in it.

    Attributes:
        state: ``[B, heads, F, E + 1]``, its last column the sum of key features.
        keys: The latest keys, at most as many as a window has, ``[B, heads, n, D]``.
        values: Their values with a one behind each, ``[B, heads, n, E + 1]``.

    """

    state: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def windowed_linear_attention_step(
    past: Window,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    window: int,
    feature: str = "hedgehog",
) -> tuple[Window, torch.Tensor]:
    """One token of causal attention, ``[B, heads * D]``, to what the next one needs and ``[B, heads * E]``.

    Before the first token, ``past`` is zeros: a state, and no keys and values (n = 0).
    """
    q, k, v = (x.unflatten(-1, (heads, 1, -1)) for x in (q, k, v))  # [B, H, 1, D or E]
    keys = torch.cat((past.keys, k), 2)
    values = torch.cat((past.values, torch.cat((v, torch.ones_like(v[..., :1])), -1)), 2)
    left = max(keys.shape[2] - window, 0)
    gone = feature_map(keys[:, :, :left], feature, projection)
    state = past.state + gone.transpose(-1, -2) @ values[:, :, :left]
    keys, values = keys[:, :, left:], values[:, :, left:]
    logits = scale * q @ keys.transpose(-1, -2) + gain[:, None, None]
    output = _mean(logits, values, feature_map(q, feature, projection) @ state)
    return Window(state, keys, values), output.flatten(1)
