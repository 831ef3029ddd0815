"""The definitions of kernelized attention with relative positions: by the Toeplitz matrix (the operator), by FFT."""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.chunks import join_heads, split_heads
from xformopt.kernels.features import feature_map
from xformopt.kernels.masked_softmax import divided

__all__ = ["toeplitz_attention", "toeplitz_attention_fft"]

_EPS = 1e-12


def toeplitz_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    causal: bool = False,
) -> torch.Tensor:
    """``o_i = sum_j c_{j-i} (phi(q_i) . phi(k_j)) v_j / sum_j c_{j-i} (phi(q_i) . phi(k_j))`` with ``c = exp(bias)``.

    Luo et al., arXiv 2106.12566: linear attention that knows relative positions, as a bias of the logits of softmax
    attention would (T5, ALiBi).  All pairs are computed here; :func:`toeplitz_attention_fft` is the paper's algorithm.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        bias: One number for each distance ``j - i`` from ``1 - L`` to ``L - 1``, ``[heads or 1, 2 L - 1]``, ``T <= L``.
        key_mask: Which keys exist, ``[B, T]`` bool (True: attend).
        projection: Of the positive random features of q and k, normalised to length one in each head,
            ``[heads, D, m]``; without it q and k are features already, not negative.
        heads: Number of heads.
        causal: A query sees no key after it.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    T = q.shape[1]
    queries, keys = _features(q, k, key_mask, projection, heads)
    at = torch.arange(T, device=q.device)
    factors = _factors(bias)[:, at - at[:, None] + bias.shape[1] // 2]  # [H or 1, T, T]
    weights = queries @ keys.transpose(-1, -2) * (factors.tril() if causal else factors)
    return join_heads(divided(weights @ split_heads(v, heads), weights.sum(-1, keepdim=True)))


def _features(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, projection: torch.Tensor | None, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of queries and keys, ``[B, H, T, m]``; keys that do not exist are zero."""
    q, k = (split_heads(x, heads) for x in (q, k))
    if projection is not None:
        q, k = (feature_map(functional.normalize(x, dim=-1, eps=_EPS), "positive", projection) for x in (q, k))
    return q, k if key_mask is None else k.masked_fill(~key_mask[:, None, :, None], 0.0)


def _factors(bias: torch.Tensor) -> torch.Tensor:
    """Return ``exp(bias)`` over its largest, which the division takes out again."""
    return (bias - bias.amax(-1, keepdim=True)).exp()


def toeplitz_attention_fft(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    causal: bool = False,
) -> torch.Tensor:
    """The same by FFT, ``O(m E T log T)`` a head, without padding.

    For each of the ``m (E + 1)`` columns of ``phi(k) [v, 1]^T`` the Toeplitz matrix is part of a circulant matrix of
    twice the size, which is diagonal in the Fourier basis.
    """
    T, E = q.shape[1], v.shape[2] // heads
    queries, keys = _features(q, k, None, projection, heads)
    values = split_heads(v, heads)
    values = torch.cat((values, torch.ones_like(values[..., :1])), -1)
    columns = keys.unsqueeze(-1) * values.unsqueeze(-2)  # [B, H, T, m, E + 1]
    factors, middle = _factors(bias), bias.shape[1] // 2
    # what the token i gets from i - d, at d; what it gets from later ones, at 2 T + d
    earlier, later = factors[:, middle - T + 1 : middle + 1].flip(1), factors[:, middle + 1 : middle + T].flip(1)
    circulant = torch.cat((earlier, torch.zeros_like(earlier[:, :1]), torch.zeros_like(later) if causal else later), 1)
    spectrum = torch.fft.rfft(circulant, dim=1)[:, :, None, None] * torch.fft.rfft(columns, n=2 * T, dim=2)
    mixed = torch.fft.irfft(spectrum, n=2 * T, dim=2)[:, :, :T]  # [B, H, T, m, E + 1]
    summed = (queries.unsqueeze(-2) @ mixed).squeeze(-2)
    return join_heads(summed[..., :E] / summed[..., E:])
