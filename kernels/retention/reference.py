"""The definitions of retention: chunkwise (the operator), masked and recurrent."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import CHUNK, decayed_attention, join_heads, split_heads

__all__ = ["retention", "retention_masked", "retention_step"]


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``S_t = gamma S_{t-1} + k_t v_t^T, o_t = scale q_t S_t`` per head (Sun et al., arXiv 2307.08621).

    Without the row normaliser of the paper's parallel form, which the group norm behind the operator absorbs.

    Args:
        q: Queries, ``[B, T, heads * D]``, rotated already.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        log_decay: ``log gamma`` of each head, ``[heads]``, not positive.
        heads: Number of heads.
        scale: Factor of the products.
        chunk: Tokens that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``.

    """
    step = log_decay[None, :, None].expand(q.shape[0], heads, q.shape[1])
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))
    return join_heads(decayed_attention(q, k, v, step, chunk))


def retention_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, *, heads: int, scale: float = 1.0
) -> torch.Tensor:
    """The parallel form, ``(scale q k^T * D) v`` with ``D_ij = gamma^(i - j)`` for ``i >= j``; quadratic in T."""
    T = q.shape[1]
    q, k, v = (split_heads(x, heads) for x in (q * scale, k, v))
    at = torch.arange(T, device=q.device, dtype=q.dtype)
    distance = at[:, None] - at  # [T, T], i - j
    decay = (log_decay[:, None, None] * distance).exp().masked_fill(distance < 0, 0.0)  # [H, T, T]
    return join_heads((q @ k.transpose(-1, -2) * decay) @ v)


def retention_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token ``[B, heads * D]`` and the state ``[B, heads, D, E]`` to the next state and ``[B, heads * E]``."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q * scale, k, v))  # [B, H, D or E]
    state = log_decay.exp()[:, None, None] * state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return state, (q.unsqueeze(-2) @ state).flatten(1)
