"""The definition of block-sparse attention."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import join_heads, split_heads
from xformopt.kernels.masked_softmax import masked_softmax

__all__ = ["block_sparse_attention"]


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    causal: bool = False,
) -> torch.Tensor:
    """``softmax(scale q k^T + bias) v`` per head over the blocks a mask allows (Child et al., arXiv 1904.10509).

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, S, heads * D]``.
        v: Values, ``[B, S, heads * E]``.
        block_mask: Which blocks of queries see which blocks of keys, ``[heads or 1, N, M]`` bool: query i is in row
            ``i // block``, key j in column ``j // block``.  ``T <= N * block`` and ``S <= M * block``; the last block
            that is used may be incomplete.
        key_mask: Which keys exist, ``[B, S]`` bool (True: attend).
        bias: Added to the scaled logits, ``[1 or B, 1 or heads, T, S]``.
        heads: Number of heads.
        scale: Factor of the logits.
        block: Tokens of a block.
        causal: Query ``i`` sees no key after ``i``, in the blocks that are allowed.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    T, S = q.shape[1], k.shape[1]
    visible = block_mask.repeat_interleave(block, 1)[:, :T].repeat_interleave(block, 2)[:, :, :S]  # [H or 1, T, S]
    if causal:
        visible = visible.tril()
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))
    logits = q @ k.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return join_heads(masked_softmax(logits, visible) @ v)
