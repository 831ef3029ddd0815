"""The definition of Manhattan attention."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import join_heads, split_heads

__all__ = ["manhattan_attention"]


def manhattan_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    heads: int,
    scale: float,
    rows: int,
    columns: int,
    decomposed: bool = False,
) -> torch.Tensor:
    """``(softmax(scale q k^T) * D) v`` per head with ``D_ij = gamma^(|x_i - x_j| + |y_i - y_j|)``.

    Retention's decay on a grid: RMT (Fan et al., arXiv 2309.11523), equations 4 and 5; decomposed, equation 6: tokens
    of a row attend to each other with ``gamma^|x_i - x_j|``, then those of a column with ``gamma^|y_i - y_j|``.

    Args:
        q: Queries, ``[B, rows * columns, heads * D]``, row by row.
        k: Keys, ``[B, rows * columns, heads * D]``.
        v: Values, ``[B, rows * columns, heads * E]``.
        log_decay: ``log gamma`` of each head, ``[heads]``, not positive.
        heads: Number of heads.
        scale: Factor of the logits.
        rows: Of the grid.
        columns: Of the grid.
        decomposed: Along the rows and then along the columns, instead of all pairs.

    Returns:
        ``[B, rows * columns, heads * E]``.

    """
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))  # [B, H, T, D]
    across, down = _distances(columns, q), _distances(rows, q)
    if not decomposed:
        distance = (down[:, None, :, None] + across[None, :, None, :]).flatten(2).flatten(0, 1)  # [T, T]
        return join_heads(_decayed(q, k, v, log_decay, distance))
    q, k, v = (x.unflatten(2, (rows, columns)).transpose(1, 2) for x in (q, k, v))  # [B, R, H, C, D]
    v = _decayed(q, k, v, log_decay, across)
    q, k, v = (x.transpose(1, 3) for x in (q, k, v))  # [B, C, H, R, D]
    attended = _decayed(q, k, v, log_decay, down).permute(0, 3, 1, 2, 4)  # [B, R, C, H, E]
    return attended.flatten(3).flatten(1, 2).contiguous()


def _decayed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor:
    decay = (log_decay[:, None, None] * distance).exp()
    return ((q @ k.transpose(-1, -2)).softmax(-1) * decay) @ v


def _distances(size: int, like: torch.Tensor) -> torch.Tensor:
    at = torch.arange(size, dtype=like.dtype, device=like.device)
    return (at[:, None] - at).abs()
