"""The definition of cross-covariance attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.chunks import join_heads, split_heads

__all__ = ["xca"]


def xca(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    temperature: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-12,
) -> torch.Tensor:
    """``softmax(temperature q^T k) v^T`` per head, each channel of q and k of length one over the tokens.

    XCiT (El-Nouby et al., arXiv 2106.09681), equation 3; the temperature multiplies, as in the authors' code.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * D]``.
        temperature: Factor of the products of each head, ``[heads]``.
        key_mask: Which tokens exist, ``[B, T]`` bool; the others have no part in the weights, and get zeros.
        heads: Number of heads.
        eps: What the length of a channel is at least.

    Returns:
        ``[B, T, heads * D]``.

    """
    if key_mask is not None:
        q, k, v = (x.masked_fill(~key_mask.unsqueeze(-1), 0.0) for x in (q, k, v))
    q, k, v = (split_heads(x, heads) for x in (q, k, v))  # [B, H, T, D]
    q, k = (functional.normalize(x, dim=-2, eps=eps) for x in (q, k))
    weights = (q.transpose(-1, -2) @ k * temperature[:, None, None]).softmax(-1)  # [B, H, D, D]
    return join_heads(v @ weights.transpose(-1, -2))
