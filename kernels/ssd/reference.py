"""The definitions of the state-space layer of Mamba-2: chunkwise (the operator), masked and recurrent."""

from __future__ import annotations

import torch

from xformopt.kernels.chunks import CHUNK, decayed_attention, join_heads, split_heads

__all__ = ["ssd", "ssd_masked", "ssd_step"]


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    heads: int,
    groups: int = 1,
    causal: bool = True,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """``h_t = exp(dt_t a) h_{t-1} + b_t (dt_t x_t)^T, y_t = c_t h_t + d x_t`` per head (Dao and Gu, arXiv 2405.21060).

    Not causal, all tokens read one state: ``y_i = c_i sum_j |dt_j a| b_j x_j^T + d x_i`` (VSSD, Shi et al., arXiv
    2407.18559, as its code weighs the tokens).

    Args:
        x: Inputs, ``[B, T, heads * P]``.
        dt: Step sizes, ``[B, T, heads]``, not negative.
        a: Rate of each head, ``[heads]``, not positive.
        b: What writes to the states, ``[B, T, groups * N]``.
        c: What reads them, ``[B, T, groups * N]``.
        d: How much of the input is added to the output, ``[heads]``.
        heads: Number of heads.
        groups: Of ``b`` and ``c``; each serves ``heads / groups`` adjacent heads.
        causal: Whether a token reads what was written up to it, or by all tokens.
        chunk: Tokens of the causal form that are computed together; the result does not depend on it.

    Returns:
        ``[B, T, heads * P]``.

    """
    read, write = (split_heads(v, groups).repeat_interleave(heads // groups, 1) for v in (c, b))  # [B, H, T, N]
    inputs = split_heads(x, heads)  # [B, H, T, P]
    step = dt.transpose(1, 2)  # [B, H, T]
    if causal:
        out = decayed_attention(read, write, inputs * step.unsqueeze(-1), step * a[:, None], chunk)
    else:
        out = read @ (write.transpose(-1, -2) @ (inputs * (step * a[:, None]).abs().unsqueeze(-1)))
    return join_heads(out if d is None else out + d[:, None, None] * inputs)


def ssd_masked(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    heads: int,
    groups: int = 1,
) -> torch.Tensor:
    """The form of attention, ``(c b^T * L) (dt x)`` with ``L_ij = exp(a sum_{j < l <= i} dt_l)``; quadratic in T."""
    read, write = (split_heads(v, groups).repeat_interleave(heads // groups, 1) for v in (c, b))
    inputs, total = split_heads(x, heads), (dt * a).transpose(1, 2).cumsum(-1)  # [B, H, T]
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()  # [B, H, T, T]
    out = (read @ write.transpose(-1, -2) * decay) @ (inputs * dt.transpose(1, 2).unsqueeze(-1))
    return join_heads(out if d is None else out + d[:, None, None] * inputs)


def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    heads: int,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token ``[B, heads * P]`` and the state ``[B, heads, N, P]`` to the next state and ``[B, heads * P]``."""
    read, write = (v.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for v in (c, b))  # [B, H, N]
    inputs: torch.Tensor = x.unflatten(-1, (heads, -1))  # [B, H, P]
    added = write.unsqueeze(-1) * (dt.unsqueeze(-1) * inputs).unsqueeze(-2)
    state = (dt * a).exp()[..., None, None] * state + added
    out = (read.unsqueeze(-2) @ state).squeeze(-2)
    return state, (out if d is None else out + d[:, None] * inputs).flatten(1)
