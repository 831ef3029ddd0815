"""The definitions of gated linear attention: chunkwise (the operator), masked and recurrent."""

from __future__ import annotations

from typing import NamedTuple

import torch

from xformopt.kernels.chunks import CHUNK, from_chunks, in_chunks, join_heads, split_heads, states

__all__ = ["gated_linear_attention", "gated_linear_attention_masked", "gated_linear_attention_step"]


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gate: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t`` per head (Yang et al., arXiv 2312.06635).

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``.
        v: Values, ``[B, T, heads * E]``.
        log_gate: ``log a``, ``[B, T, heads * D]``, not positive.
        heads: Number of heads.
        scale: Factor of the products; the paper's is ``D ** -0.5``.
        chunk: Tokens that are computed together, a power of two; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``.

    """
    T = q.shape[1]
    q, k, v, gate = (in_chunks(split_heads(x, heads), chunk) for x in (q * scale, k, v, log_gate))
    within = _within(q, k, v, gate)
    added = (k * within.to_end.exp()).transpose(-1, -2) @ v  # [B, H, N, D, E]
    left = within.since_start[..., -1, :].exp().unsqueeze(-1)  # [B, H, N, D, 1]
    before = states(added, left)
    return join_heads(from_chunks(within.out + (q * within.since_start.exp()) @ before, T))


class _Within(NamedTuple):
    """What a block of tokens computes by itself.

    Attributes:
        out: Attention of the block's tokens to each other, ``[..., C, E]``.
        since_start: Sum of log gates from the block's first token up to each, both included, ``[..., C, D]``.
        to_end: Sum of log gates after each token up to the block's last, ``[..., C, D]``.

    """

    out: torch.Tensor
    since_start: torch.Tensor
    to_end: torch.Tensor


def _within(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> _Within:
    """Halve the block: each half by itself, then the second half's queries on the first half's keys.

    The gates between such a pair are those from the key to the middle and those from the middle to the query, so both
    factors of ``exp`` are at most one.  ``q, k, gate [..., C, D]``, ``v [..., C, E]``.
    """
    C = q.shape[-2]
    if C == 1:
        return _Within((q * k).sum(-1, keepdim=True) * v, gate, torch.zeros_like(gate))
    halves = [x.unflatten(-2, (2, C // 2)) for x in (q, k, v, gate)]
    out, since_start, to_end = (x.unbind(-3) for x in _within(*halves))
    first_k, first_v, second_q = halves[1][..., 0, :, :], halves[2][..., 0, :, :], halves[0][..., 1, :, :]
    weights = (second_q * since_start[1].exp()) @ (first_k * to_end[0].exp()).transpose(-1, -2)
    first_total, second_total = (x[..., -1:, :] for x in since_start)
    return _Within(
        torch.cat((out[0], out[1] + weights @ first_v), -2),
        torch.cat((since_start[0], since_start[1] + first_total), -2),
        torch.cat((to_end[0] + second_total, to_end[1]), -2),
    )


def gated_linear_attention_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gate: torch.Tensor, *, heads: int, scale: float = 1.0
) -> torch.Tensor:
    """All pairs: ``o_i = scale sum_{j <= i} sum_d q_id k_jd exp(sum_{j < l <= i} log a_ld) v_j``; quadratic in T."""
    q, k, v, gate = (split_heads(x, heads) for x in (q * scale, k, v, log_gate))
    total = gate.cumsum(2)
    between = total.unsqueeze(3) - total.unsqueeze(2)  # [B, H, T, T, D]
    later = torch.ones(between.shape[2:4], dtype=torch.bool, device=q.device).triu(1)
    decay = between.masked_fill(later.unsqueeze(-1), float("-inf")).exp()
    return join_heads(torch.einsum("bhid,bhjd,bhijd->bhij", q, k, decay) @ v)


def gated_linear_attention_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gate: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token ``[B, heads * D]`` and the state ``[B, heads, D, E]`` to the next state and ``[B, heads * E]``."""
    q, k, v, gate = (x.unflatten(-1, (heads, -1)) for x in (q * scale, k, v, log_gate))  # [B, H, D or E]
    state = gate.exp().unsqueeze(-1) * state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return state, (q.unsqueeze(-2) @ state).flatten(1)
