"""The definition of cross-covariance attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.chunks import join_heads, split_heads

__all__ = ["EQUAL", "xca"]

# products as close as this count as equal: of a single token all are, but for rounding
EQUAL = 1e-5


def xca(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    temperature: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-12,
    top: int = 0,
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
        top: How many channels of its head a channel mixes, those of the largest products (DRSformer, Chen et al.,
            arXiv 2303.11950); more where products are equal; 0: all.

    Returns:
        ``[B, T, heads * D]``.

    """
    if key_mask is not None:
        q, k, v = (x.masked_fill(~key_mask.unsqueeze(-1), 0.0) for x in (q, k, v))
    q, k, v = (split_heads(x, heads) for x in (q, k, v))  # [B, H, T, D]
    q, k = (functional.normalize(x, dim=-2, eps=eps) for x in (q, k))
    logits = q.transpose(-1, -2) @ k * temperature[:, None, None]  # [B, H, D, D]
    if top:
        least = logits.detach().topk(top).values[..., -1:] - EQUAL
        logits = logits.masked_fill(logits < least, float("-inf"))
    return join_heads(v @ logits.softmax(-1).transpose(-1, -2))
