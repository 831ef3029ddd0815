"""The definitions of attention as a prefix scan: of logarithmic depth (the operator), masked and recurrent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from xformopt.kernels.chunks import join_heads, split_heads
from xformopt.kernels.masked_softmax import divided, masked_softmax

__all__ = [
    "Prefix",
    "prefix_scan_attention",
    "prefix_scan_attention_masked",
    "prefix_scan_attention_start",
    "prefix_scan_attention_step",
]


class Prefix(NamedTuple):
    """Weighted values and weights of some tokens, both over ``exp(peak)``; adding them is associative.

    Attributes:
        peak: The largest logit, ``[..., 1]``.
        weights: The softmax's denominator, ``[..., 1]``.
        values: Its numerator, ``[..., E]``.

    """

    peak: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor

    def plus(self, other: Prefix) -> Prefix:
        """Return both sets of tokens together."""
        peak = torch.maximum(self.peak, other.peak)
        mine, theirs = (self.peak - peak).exp(), (other.peak - peak).exp()
        values = mine * self.values + theirs * other.values
        return Prefix(peak, mine * self.weights + theirs * other.weights, values)

    def mean(self) -> torch.Tensor:
        """Return the weighted mean; zeros of no tokens."""
        return divided(self.values, self.weights)


def _nowhere(dtype: torch.dtype) -> float:
    """Return the peak of no tokens: far below any logit, and finite."""
    return torch.finfo(dtype).min / 4


def prefix_scan_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """``o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)`` with ``s_j = scale q . k_j`` per head.

    Aaren (Feng et al., arXiv 2405.13956), section 3.2: the query is a parameter of the layer and not of the token, so
    the attention of all prefixes is one scan over (maximum, denominator, numerator), here by the algorithm of Hillis
    and Steele: after step n each token holds the sum of the last ``2 ** n`` tokens.

    Args:
        q: The query, ``[heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        key_mask: Which keys exist, ``[B, T]`` bool (True: attend).
        heads: Number of heads.
        scale: Factor of the logits.

    Returns:
        ``[B, T, heads * E]``.  A token with no key so far gets zeros.

    """
    total = _tokens(q, k, v, key_mask, heads, scale)
    reach = 1
    while reach < k.shape[1]:
        total = _earlier(total, reach).plus(total)
        reach *= 2
    return join_heads(total.mean())


def _tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, heads: int, scale: float
) -> Prefix:
    """Return each token by itself, ``[B, H, T, .]``."""
    query = (q * scale).unflatten(0, (heads, -1)).unsqueeze(-1)  # [H, D, 1]
    logits = split_heads(k, heads) @ query  # [B, H, T, 1]
    values, weights = split_heads(v, heads), torch.ones_like(logits)
    if key_mask is None:
        return Prefix(logits, weights, values)
    exists = key_mask[:, None, :, None]
    return Prefix(torch.where(exists, logits, _nowhere(logits.dtype)), weights * exists, values * exists)


def _earlier(prefix: Prefix, tokens: int) -> Prefix:
    """Return what each token held that is some tokens before; the first ones get nothing."""

    def shifted(x: torch.Tensor, first: float) -> torch.Tensor:
        return functional.pad(x, (0, 0, tokens, -tokens), value=first)

    return Prefix(
        shifted(prefix.peak, _nowhere(prefix.peak.dtype)), shifted(prefix.weights, 0.0), shifted(prefix.values, 0.0)
    )


def prefix_scan_attention_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """The form of attention: a softmax over all earlier tokens for each; quadratic in T."""
    tokens = _tokens(q, k, v, None, heads, scale)
    T = k.shape[1]
    visible = torch.ones(T, T, dtype=torch.bool, device=k.device).tril()
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    logits = tokens.peak.transpose(-1, -2).expand(-1, -1, T, -1)
    return join_heads(masked_softmax(logits, visible) @ tokens.values)


def prefix_scan_attention_start(v: torch.Tensor, *, heads: int) -> Prefix:
    """Return the state before the first token, for values of a token ``[B, heads * E]``."""
    values = torch.zeros_like(v).unflatten(-1, (heads, -1))  # [B, H, E]
    nothing = values[..., :1]
    return Prefix(nothing + _nowhere(v.dtype), nothing, values)


def prefix_scan_attention_step(
    state: Prefix, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, scale: float
) -> tuple[Prefix, torch.Tensor]:
    """One token ``[B, heads * D]`` and the state to the next state and ``[B, heads * E]``."""
    keys, values = (x.unflatten(-1, (heads, -1)) for x in (k, v))  # [B, H, D or E]
    logits = (keys * (q * scale).unflatten(0, (heads, -1))).sum(-1, keepdim=True)
    state = state.plus(Prefix(logits, torch.ones_like(logits), values))
    return state, state.mean().flatten(1)
