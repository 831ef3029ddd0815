"""The definition of Combiner attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from xformopt.kernels.chunks import chunk_count, join_heads, split_heads
from xformopt.kernels.masked_softmax import masked_softmax

__all__ = ["combiner_attention"]


def combiner_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    causal: bool = False,
) -> torch.Tensor:
    """Full attention in factors: Combiner (Ren et al., NeurIPS 2021, arXiv 2107.05768), its fixed pattern.

    A query shares its weights out among the keys of its own block and all other blocks as wholes, in one softmax over
    ``scale q_i k_j`` and ``scale q_i k_R``; a block shares what it gets out among its keys by ``softmax_j(scale q_R
    k_j)``.  ``q_R`` and ``k_R`` are the largest entries of the block's queries and keys.  So every query has some
    weight on every key, and the weights sum up to one.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        key_mask: Which tokens exist, ``[B, T]`` bool (True: attend).
        heads: Number of heads.
        scale: Factor of the logits.
        block: Tokens of a block; the last one may be incomplete.
        causal: Query ``i`` sees no key after ``i``: blocks strictly before its own, and its own up to itself.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    B, T = q.shape[:2]
    N = chunk_count(T, block)
    exists = key_mask if key_mask is not None else torch.ones(B, T, dtype=torch.bool, device=q.device)
    exists = functional.pad(exists, (0, N * block - T)).unflatten(1, (N, block))[:, None]  # [B, 1, N, b]
    q, k, v = (
        functional.pad(split_heads(x, heads), (0, 0, 0, N * block - T)).unflatten(2, (N, block)) for x in (q, k, v)
    )  # [B, H, N, b, .]
    q = q * scale
    query, key = (_largest(x, exists) for x in (q, k))  # [B, H, N, D]
    inside = masked_softmax((k @ query.unsqueeze(-1)).squeeze(-1), exists)  # [B, H, N, b]
    value = (inside.unsqueeze(3) @ v).squeeze(3)  # [B, H, N, E]
    own = exists.unsqueeze(3).expand(-1, -1, -1, block, -1)  # [B, 1, N, b, b]
    others = ~torch.eye(N, dtype=torch.bool, device=q.device)
    if causal:
        own, others = own.tril(), others.tril()
    others = (others & exists.any(-1)[:, :, None])[:, :, :, None].expand(-1, -1, -1, block, -1)  # [B, 1, N, b, N]
    logits = torch.cat([q @ k.transpose(-1, -2), q @ key.transpose(-1, -2).unsqueeze(2)], -1)  # [B, H, N, b, b + N]
    weights = masked_softmax(logits, torch.cat([own, others], -1))
    attended = weights[..., :block] @ v + weights[..., block:] @ value.unsqueeze(2)
    return join_heads(attended.flatten(2, 3)[:, :, :T])


def _largest(x: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return the largest entries over the tokens of each block that exist, zeros where none does."""
    found = x.masked_fill(~exists.unsqueeze(-1), float("-inf")).amax(3)
    return torch.where(exists.any(-1, keepdim=True), found, 0.0)
