"""The definition of attention on packed sequences."""

from __future__ import annotations

from itertools import pairwise

import torch

from xformopt.kernels.attention.reference import attention

__all__ = ["attention_packed"]


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """``xf.attention`` of each sequence by itself (ByteTransformer, Zhai et al., arXiv 2210.03052).

    Args:
        q: Queries of all sequences, ``[1, N, heads * D]``.
        k: Keys, ``[1, N, kv_heads * D]``.
        v: Values, ``[1, N, kv_heads * E]``.
        offsets: Where each sequence begins, and where the last one ends, ``[B + 1]`` int64; sequences may be empty.
        keys: How many tokens of each sequence are seen, the first ones, ``[B]`` int64; None: all.
        heads: Query heads.
        kv_heads: Key/value heads.
        scale: Factor of the logits.
        causal: A query sees no key behind it.

    Returns:
        ``[1, N, heads * E]``.  A query that sees no key gets zeros.

    """
    attended = [q.new_zeros(1, 0, v.shape[2] // kv_heads * heads)]
    for number, (start, end) in enumerate(pairwise(offsets.tolist())):
        rows = slice(start, end)
        seen = None if keys is None else (torch.arange(end - start, device=q.device) < keys[number]).unsqueeze(0)
        if end > start:
            own = (q[:, rows], k[:, rows], v[:, rows])
            attended.append(attention(*own, seen, heads=heads, kv_heads=kv_heads, scale=scale, causal=causal))
    return torch.cat(attended, 1)
