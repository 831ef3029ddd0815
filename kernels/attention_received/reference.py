"""The definition of attention received."""

from __future__ import annotations

import torch

__all__ = ["attention_received"]


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    key_log_size: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    first: int = 0,
) -> torch.Tensor:
    """Return the mean attention weight each key gets, over heads and queries.

    Over the class token's query alone it is the score of Liang et al., EViT, arXiv 2202.07800; over all queries that of
    Kim et al., Learned Token Pruning, arXiv 2107.00910, equation 3.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, S, kv_heads * D]``.
        key_mask: Which keys exist, ``[B, S]`` bool; queries of padding do not count where ``T = S``.
        key_log_size: Log of the number of tokens each key stands for, ``[B, S]``.
        heads: Query heads.
        kv_heads: Key heads; each serves ``heads / kv_heads`` adjacent query heads.
        scale: Factor of the logits.
        first: How many queries from the front count; 0: all.

    Returns:
        ``[B, S]``; 0 for keys that do not exist.

    """
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    q = q.reshape(B, T, heads, -1).transpose(1, 2)  # [B, H, T, D]
    q = q[:, :, :first] if first else q
    k = k.reshape(B, S, kv_heads, -1).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)  # [B, H, S, D]
    logits = (q * scale) @ k.transpose(-1, -2)
    if key_log_size is not None:
        logits = logits + key_log_size[:, None, None, :]
    if key_mask is None:
        return logits.softmax(-1).mean((1, 2))
    floor = torch.finfo(logits.dtype).min / 4
    weights = logits.masked_fill(~key_mask[:, None, None, :], floor).softmax(-1)
    counted = key_mask[:, :first] if first else key_mask
    rows = counted.to(weights.dtype)[:, None, :, None]  # [B, 1, T, 1]
    received = (weights * rows).sum((1, 2)) / (heads * rows.sum((1, 2)).clamp(min=1))
    return received * key_mask.to(weights.dtype)
