"""The definitions of the delta rule: chunkwise (the operator), for all pairs and recurrent."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import CHUNK, from_chunks, in_chunks, join_heads, split_heads

__all__ = ["delta_rule", "delta_rule_masked", "delta_rule_resumed", "delta_rule_step"]


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T, o_t = scale q_t S_t`` per head.

    DeltaNet (Schlag et al., arXiv 2102.11174), parallel over tokens (Yang et al., arXiv 2406.06484).  A
    chunk is computed by the WY representation of its product of Householder-like matrices ``I - beta k k^T``.

    Args:
        q: Queries, ``[B, T, heads * D]``.
        k: Keys, ``[B, T, heads * D]``, of length one in each head: the caller normalises them.
        v: Values, ``[B, T, heads * E]``.
        beta: How much of the old value is replaced, ``[B, T, heads]``: 0 to 1, or to 2 for negative eigenvalues
            (Grazzi et al., arXiv 2411.12537).
        heads: Number of heads.
        scale: Factor of the products of queries.
        chunk: Tokens that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``.

    """
    state = v.new_zeros(v.shape[0], heads, k.shape[2] // heads, v.shape[2] // heads)
    return delta_rule_resumed(q, k, v, beta, state, heads=heads, scale=scale, chunk=chunk)[0]


def delta_rule_resumed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`delta_rule` of tokens that go on after others.

    Args:
        q: See :func:`delta_rule`.
        k: See :func:`delta_rule`.
        v: See :func:`delta_rule`.
        beta: See :func:`delta_rule`.
        state: What the tokens before left, ``[B, heads, D, E]``.
        heads: Number of heads.
        scale: Factor of the products of queries.
        chunk: Tokens that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * E]``, and the state after the last token, of the shape and dtype of ``state``.

    """
    T = q.shape[1]
    q, k, v, beta = (in_chunks(split_heads(x, heads), chunk) for x in (q * scale, k, v, beta))
    keys, values = _independent(k, v, beta)
    inside = (q @ k.transpose(-1, -2)).tril()  # [B, H, N, C, C]
    outputs = []
    for n in range(k.shape[2]):
        written = values[:, :, n] - keys[:, :, n] @ state  # [B, H, C, E]
        outputs.append(q[:, :, n] @ state + inside[:, :, n] @ written)
        state = state + k[:, :, n].transpose(-1, -2) @ written
    return join_heads(from_chunks(torch.stack(outputs, 2), T)), state


def _independent(k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a block writes in terms of its first state only: ``values - keys @ state``.

    Token i writes ``u_i = beta_i (v_i - k_i S)`` where S has what the block wrote before: the rows of ``u`` solve
    ``(I + tril(beta k k^T, -1)) u = beta (v - k S_0)``, which is linear in the two terms on the right.
    ``k [..., C, D]``, ``v [..., C, E]``, ``beta [..., C, 1]``.
    """
    system = (beta * k @ k.transpose(-1, -2)).tril(-1)
    right = beta * torch.cat((k, v), -1)
    # the diagonal of ones is implied
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved[..., : k.shape[-1]], solved[..., k.shape[-1] :]


def delta_rule_masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, *, heads: int, scale: float = 1.0
) -> torch.Tensor:
    """The form of attention, ``tril(scale q k^T) u`` with ``u`` from one triangular system over all tokens."""
    q, k, v, beta = (split_heads(x, heads) for x in (q * scale, k, v, beta))
    system = torch.eye(k.shape[2], dtype=k.dtype, device=k.device) + (beta * k @ k.transpose(-1, -2)).tril(-1)
    written = torch.linalg.solve(system, beta * v)
    return join_heads((q @ k.transpose(-1, -2)).tril() @ written)


def delta_rule_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token ``[B, heads * D]`` and the state ``[B, heads, D, E]`` to the next state and ``[B, heads * E]``."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q * scale, k, v))  # [B, H, D or E]
    held = (k.unsqueeze(-2) @ state).squeeze(-2)  # [B, H, E]
    state = state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * (v - held)).unsqueeze(-2)
    return state, (q.unsqueeze(-2) @ state).flatten(1)
