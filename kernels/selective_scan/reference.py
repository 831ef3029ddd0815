"""The definitions of the selective scan of Mamba-1: by chunks (the operator), over all pairs and recurrent."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import CHUNK, in_chunks, states

__all__ = ["selective_scan", "selective_scan_masked", "selective_scan_step"]


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t, y_t = c_t . h_t + d x_t`` per channel (Gu and Dao, arXiv 2312.00752).

    The decay differs for each channel and state, so no product of matrices computes a chunk: all chunks take their
    first token at once, then their second, and so on; what came before a chunk is added afterwards.

    Args:
        x: Inputs, ``[B, T, C]``.
        dt: Step sizes, ``[B, T, C]``, not negative.
        a: Rates, ``[C, N]``, not positive.
        b: What writes to the states, ``[B, T, N]``.
        c: What reads them, ``[B, T, N]``.
        d: How much of the input is added to the output, ``[C]``.
        chunk: Tokens of a chunk; the result does not depend on it.

    Returns:
        ``[B, T, C]``.

    """
    inputs, step, write, read = (
        in_chunks(v.unsqueeze(1), chunk).squeeze(1) for v in (dt * x, dt, b, c)
    )  # [B, n, L, .]
    decay = step.unsqueeze(-1) * a  # [B, n, L, C, N], logarithms
    added = inputs.unsqueeze(-1) * write.unsqueeze(-2)
    state = torch.zeros_like(added[:, :, 0])  # [B, n, C, N]
    inside = []
    for t in range(chunk):
        state = decay[:, :, t].exp() * state + added[:, :, t]
        inside.append(state)
    since_start = decay.cumsum(2).exp()
    before = states(state.unsqueeze(1), since_start[:, None, :, -1])[:, 0]  # [B, n, C, N]
    reached = torch.stack(inside, 2) + since_start * before.unsqueeze(2)
    y = (reached @ read.unsqueeze(-1)).squeeze(-1).flatten(1, 2)[:, : x.shape[1]].contiguous()  # [B, T, C]
    return y if d is None else y + d * x


def selective_scan_masked(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y_i = sum_{j <= i} sum_n c_in b_jn exp(a_n sum_{j < l <= i} dt_l) dt_j x_j + d x_i``: all pairs of tokens."""
    total = (dt.unsqueeze(-1) * a).cumsum(1)  # [B, T, C, N]
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    between = (total.unsqueeze(2) - total.unsqueeze(1)).masked_fill(later[..., None, None], float("-inf"))
    y = torch.einsum("bin,bjn,bijcn,bjc->bic", c, b, between.exp(), dt * x)
    return y if d is None else y + d * x


def selective_scan_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token ``[B, C]`` and the state ``[B, C, N]`` to the next state and ``[B, C]``."""
    state = (dt.unsqueeze(-1) * a).exp() * state + (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
    y = (state @ c.unsqueeze(-1)).squeeze(-1)
    return state, y if d is None else y + d * x
