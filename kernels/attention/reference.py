"""The definition of softmax attention."""

from __future__ import annotations

import torch

__all__ = ["attention", "attention_values", "attention_weights", "visible_keys"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_log_size: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> torch.Tensor:
    """``softmax(scale q k^T + bias + log size) v`` per head (Vaswani et al., arXiv 1706.03762).

    Args:
        q: Queries, ``[B, T, heads * D]``; the channels of one head are adjacent.
        k: Keys, ``[B, S, kv_heads * D]``.
        v: Values, ``[B, S, kv_heads * E]``.
        key_mask: Which keys exist, ``[B, S]`` bool (True: attend).
        bias: Added to the scaled logits, broadcastable to ``[B, heads, T, S]``.
        key_log_size: Log of the number of tokens each key stands for, ``[B, S]`` (ToMe's proportional attention).
        heads: Query heads.
        kv_heads: Key/value heads; each serves ``heads / kv_heads`` adjacent query heads.
        scale: Factor of the logits.
        causal: Query ``i`` sees no key after ``i + S - T``.
        window_left: Query ``i`` sees no key before ``i + S - T - window_left``; -1: no bound.
        window_right: Query ``i`` sees no key after ``i + S - T + window_right``; -1: no bound.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    weights = attention_weights(
        q,
        k,
        key_mask,
        bias,
        key_log_size,
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
    )
    return attention_values(weights, v, heads=heads, kv_heads=kv_heads)


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_log_size: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> torch.Tensor:
    """``softmax(scale q k^T + bias + log size)`` per head, ``[B, heads, T, S]``; arguments as of :func:`attention`."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    q = q.reshape(B, T, heads, -1).transpose(1, 2)  # [B, H, T, D]
    k = k.reshape(B, S, kv_heads, -1).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)  # [B, H, S, D]
    logits = (q * scale) @ k.transpose(-1, -2)  # [B, H, T, S]
    if bias is not None:
        logits = logits + bias
    if key_log_size is not None:
        logits = logits + key_log_size[:, None, None, :]
    visible = visible_keys(T, S, causal, window_left, window_right, device=q.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    logits = logits.masked_fill(~visible, float("-inf"))
    # subtracting a finite maximum keeps rows without any key at zero instead of NaN
    peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)


def attention_values(weights: torch.Tensor, v: torch.Tensor, *, heads: int, kv_heads: int) -> torch.Tensor:
    """Sum the values ``[B, S, kv_heads * E]`` by weights ``[B, heads, T, S]``: returns ``[B, T, heads * E]``."""
    B, S = v.shape[:2]
    v = v.reshape(B, S, kv_heads, -1).transpose(1, 2).repeat_interleave(heads // kv_heads, 1)  # [B, H, S, E]
    return (weights @ v).transpose(1, 2).reshape(B, weights.shape[2], -1)


def visible_keys(
    T: int, S: int, causal: bool, window_left: int, window_right: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return which key each query may see by position alone, ``[T, S]`` bool."""
    distance = torch.arange(S, device=device) - torch.arange(S - T, S, device=device).unsqueeze(1)  # j - i
    visible = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        visible &= distance <= 0
    if window_left >= 0:
        visible &= distance >= -window_left
    if window_right >= 0:
        visible &= distance <= window_right
    return visible
