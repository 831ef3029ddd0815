"""The definitions of flow attention: over all tokens or causal (the operator), and recurrent."""

from __future__ import annotations

from typing import NamedTuple

import torch

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.linear_attention.reference import linear_attention
from xformopt.kernels.masked_softmax import divided

__all__ = ["FlowState", "flow_attention", "flow_attention_start", "flow_attention_step"]


def flow_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    *,
    heads: int,
    causal: bool = False,
    eps: float = 1e-6,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Flowformer's attention per head (Wu et al., arXiv 2202.06258), as the authors' code computes it.

    With q and k through a sigmoid, ``I_i = q_i . sum_j k_j`` flows into a query and ``O_j = k_j . sum_i q_i`` out of a
    key.  Conserved, these are ``I'_i = q_i . sum_j k_j / O_j`` and ``O'_j = k_j . sum_i q_i / I_i`` within -1 and 1.
    The result is ``sigmoid(I' T / S) (q / I) (k^T (softmax_j(O') S v))``.  Causal, every sum runs over the tokens so
    far, and their number takes the place of T and S.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, S, heads * D]``.
        v: Values, ``[B, S, heads * E]``.
        key_mask: Which keys exist, ``[B, S]`` bool.
        query_mask: Which queries exist, ``[B, T]`` bool; the others have no part in any flow, and get zeros.
        heads: Number of heads.
        causal: A token sees itself and those before it.
        eps: Added to q and k and to their sums in each product.
        chunk: Tokens of causal attention that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``.  A query that sees no key gets zeros.

    """
    queries = _existing(q, query_mask)  # [B, T, 1, 1], ones and zeros
    keys = _existing(k, key_mask)
    q, k = (x.sigmoid().unflatten(-1, (heads, -1)) for x in (q, k))  # [B, T, H, D]
    q, k = q * queries, k * keys
    values = v.unflatten(-1, (heads, -1))
    flow = _causal_flow(q, k, keys, eps) if causal else _flow(q, k, queries, keys, eps)
    mixed = linear_attention(
        (q * flow.incoming).flatten(2),
        k.flatten(2),
        (values * flow.competition).flatten(2),
        heads=heads,
        feature="given",
        causal=causal,
        normalize=False,
        chunk=chunk,
    )
    allocated: torch.Tensor = mixed.unflatten(-1, (heads, -1)) * flow.allocation
    return allocated.flatten(2)


class _Flow(NamedTuple):
    """What multiplies queries, values and results, ``[B, T, H, 1]`` each."""

    incoming: torch.Tensor
    competition: torch.Tensor
    allocation: torch.Tensor


def _existing(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    exists: torch.Tensor = torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype)
    return exists[:, :, None, None]


def _product(x: torch.Tensor, total: torch.Tensor, eps: float) -> torch.Tensor:
    return ((x + eps) * (total + eps)).sum(-1, keepdim=True)


def _flow(q: torch.Tensor, k: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, eps: float) -> _Flow:
    T, S = (exists.sum(1, keepdim=True) for exists in (queries, keys))
    incoming = 1 / _product(q, k.sum(1, keepdim=True), eps)
    outgoing = 1 / _product(k, q.sum(1, keepdim=True), eps)
    conserved_in = _product(q, (k * outgoing).sum(1, keepdim=True), eps)
    conserved_out = _product(k, (q * incoming).sum(1, keepdim=True), eps).clamp(-1, 1)
    strength = conserved_out.exp() * keys
    competition = divided(strength, strength.sum(1, keepdim=True)) * S
    return _Flow(incoming, competition, (conserved_in * T / S.clamp(min=1)).sigmoid())


def _causal_flow(q: torch.Tensor, k: torch.Tensor, keys: torch.Tensor, eps: float) -> _Flow:
    count = keys.cumsum(1).clamp(min=1)
    incoming = 1 / _product(q, k.cumsum(1), eps)
    outgoing = 1 / _product(k, q.cumsum(1), eps)
    conserved_in = _product(q, (k * (outgoing * count)).cumsum(1), eps) / count
    conserved_out = (_product(k, (q * (incoming * count)).cumsum(1), eps) / count).clamp(-1, 1)
    strength = conserved_out.exp() * keys
    return _Flow(incoming, divided(strength, strength.cumsum(1)) * count, conserved_in.sigmoid())


class FlowState(NamedTuple):
    """Sums over the tokens so far.

    Attributes:
        tokens: How many there are, ``[B, 1, 1]``.
        keys: Of keys, ``[B, H, D]``.
        queries: Of queries.
        sent: Of keys over what flows out of them.
        received: Of queries over what flows into them.
        strength: Of the exponentials of what is conserved of a key's flow, ``[B, H, 1]``.
        memory: Of keys times values, ``[B, H, D, E]``.

    """

    tokens: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    sent: torch.Tensor
    received: torch.Tensor
    strength: torch.Tensor
    memory: torch.Tensor


def flow_attention_start(q: torch.Tensor, v: torch.Tensor, *, heads: int) -> FlowState:
    """Return the state before the first token, for ``q [B, heads * D]`` and ``v [B, heads * E]``."""
    B, D, E = q.shape[0], q.shape[1] // heads, v.shape[1] // heads
    sums = q.new_zeros(B, heads, D)
    return FlowState(
        q.new_zeros(B, 1, 1), sums, sums, sums, sums, q.new_zeros(B, heads, 1), q.new_zeros(B, heads, D, E)
    )


def flow_attention_step(
    state: FlowState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, eps: float = 1e-6
) -> tuple[FlowState, torch.Tensor]:
    """One token of causal attention, ``[B, heads * D]``, to the next state and ``[B, heads * E]``."""
    q, k = (x.sigmoid().unflatten(-1, (heads, -1)) for x in (q, k))  # [B, H, D]
    count = state.tokens + 1
    keys, queries = state.keys + k, state.queries + q
    incoming, outgoing = 1 / _product(q, keys, eps), 1 / _product(k, queries, eps)
    sent, received = state.sent + k * (outgoing * count), state.received + q * (incoming * count)
    allocation = (_product(q, sent, eps) / count).sigmoid()
    strength = (_product(k, received, eps) / count).clamp(-1, 1).exp()
    total = state.strength + strength
    value = v.unflatten(-1, (heads, -1)) * (strength / total * count)  # [B, H, E]
    memory = state.memory + k.unsqueeze(-1) * value.unsqueeze(-2)
    mixed = ((q * incoming).unsqueeze(-2) @ memory).squeeze(-2) * allocation
    return FlowState(count, keys, queries, sent, received, total, memory), mixed.flatten(1)
