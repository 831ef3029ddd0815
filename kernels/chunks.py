"""What the recurrent operators share: heads apart, tokens in chunks, states handed from chunk to chunk.

A recurrence ``S_t = a_t S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t`` is computed a chunk at a time: products inside of a
chunk as in masked attention, and one state per chunk for all that came before (Hua et al., arXiv 2202.10447; Sun et
al., arXiv 2307.08621).  Decays are kept as logarithms, and only sums of them (never positive) are exponentiated: no
difference of two running sums, which would lose digits, and no growing exponential, which would overflow.
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = [
    "CHUNK",
    "chunk_count",
    "decayed_attention",
    "from_chunks",
    "in_chunks",
    "join_heads",
    "split_heads",
    "states",
]

# tokens of a chunk: the products inside of one cost as much as the state where heads are this wide
CHUNK = 64


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn ``[B, T, heads * D]`` into ``[B, heads, T, D]``."""
    parts: torch.Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """Turn ``[B, H, T, E]`` into ``[B, T, H * E]``."""
    return x.transpose(1, 2).flatten(2).contiguous()


def chunk_count(T: int, chunk: int = CHUNK) -> int:
    """Return how many chunks hold ``T`` tokens."""
    return -(-T // chunk)


def in_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Cut ``[B, H, T, D]`` into ``[B, H, N, chunk, D]``; the last chunk is filled with zeros.

    A token of zeros adds nothing to a state, and a log decay of zero keeps it.
    """
    padded = functional.pad(x, (0, 0, 0, -x.shape[2] % chunk))
    parts: torch.Tensor = padded.unflatten(2, (-1, chunk))
    return parts


def from_chunks(x: torch.Tensor, T: int) -> torch.Tensor:
    """Turn ``[B, H, N, chunk, E]`` into ``[B, H, T, E]``."""
    return x.flatten(2, 3)[:, :, :T]


def states(added: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Return the state before each chunk, ``S_{n+1} = decay_n S_n + added_n`` from ``S_0 = 0``.

    Args:
        added: What each chunk adds, ``[B, H, N, D, E]``.
        decay: What is left of a state after each chunk, ``[B, H, N, D or 1, 1]``.

    Returns:
        ``[B, H, N, D, E]``.

    """
    state = torch.zeros_like(added[:, :, 0])
    before = []
    for n in range(added.shape[2]):
        before.append(state)
        state = decay[:, :, n] * state + added[:, :, n]
    return torch.stack(before, 2)


def decayed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, chunk: int = CHUNK
) -> torch.Tensor:
    """``o_i = sum_{j <= i} exp(sum_{j < l <= i} log_decay_l) (q_i . k_j) v_j``: one decay a token and head.

    Args:
        q: Queries, ``[B, H, T, D]``.
        k: Keys, ``[B, H, T, D]``.
        v: Values, ``[B, H, T, E]``.
        log_decay: Logarithm of the factor a state is multiplied by before the token is added, ``[B, H, T]``.
        chunk: Tokens of a chunk.

    Returns:
        ``[B, H, T, E]``.

    """
    T = q.shape[2]
    q, k, v = (in_chunks(x, chunk) for x in (q, k, v))
    step = in_chunks(log_decay.unsqueeze(-1), chunk)  # [B, H, N, C, 1]
    between = _sums_between(step)  # [B, H, N, C, C]
    inside = (q @ k.transpose(-1, -2) * between.exp()) @ v
    since_start = step.cumsum(-2)  # [B, H, N, C, 1]
    to_end = between[..., -1, :].unsqueeze(-1)  # [B, H, N, C, 1]
    added = (k * to_end.exp()).transpose(-1, -2) @ v  # [B, H, N, D, E]
    before = states(added, since_start[..., -1:, :].exp())
    return from_chunks(inside + (q * since_start.exp()) @ before, T)


def _sums_between(step: torch.Tensor) -> torch.Tensor:
    """Return ``sum_{j < l <= i} step_l`` at ``[..., i, j]``, minus infinity where ``j > i``; ``step [..., C, 1]``."""
    C = step.shape[-2]
    later = torch.ones(C, C, dtype=torch.bool, device=step.device).tril(-1)
    sums = torch.where(later, step, 0.0).cumsum(-2)
    return sums.masked_fill(~(later | torch.eye(C, dtype=torch.bool, device=step.device)), float("-inf"))
