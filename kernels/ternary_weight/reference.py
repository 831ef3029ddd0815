"""The definition of binary and ternary weights with scales from statistics (Liu et al., arXiv 2306.01841).

    binary:     W^ = a sign(W - m),                          a = mean|W|
    ternary:    W^ = a round(clip((W - m) / a, -1, 1)),      a = 4/3 mean|W - m|,    m = mean(W)

The result is kept in floating point.
"""

from __future__ import annotations

import torch

__all__ = ["statistics", "ternary_weight"]


def ternary_weight(weight: torch.Tensor, *, bits: int, per_row: bool = False) -> torch.Tensor:
    """Round a weight, the gradient passing straight through where ``|W - m| <= a``.

    Args:
        weight: ``[O, I]``.
        bits: 1 for two values, 2 for three.
        per_row: Whether mean and scale are those of each row, instead of the whole matrix.

    Returns:
        The shape and dtype of ``weight``.

    """
    mean, scale = statistics(weight.detach(), bits=bits, per_row=per_row)
    clipped = ((weight - mean) / scale).clamp(-1, 1)
    kept = clipped.detach()
    # the sign of 0 is 1: there is no third value
    level = torch.where(kept < 0, -1.0, 1.0).to(weight.dtype) if bits == 1 else kept.round()
    return (level + (clipped - kept) if weight.requires_grad else level) * scale


def statistics(weight: torch.Tensor, *, bits: int, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and scale, ``[O, 1]`` or ``[1, 1]``; the scale of nothing but the mean is 1."""
    axes = (1,) if per_row else (0, 1)
    mean = weight.mean(axes, keepdim=True)
    if bits == 1:
        scale = weight.abs().mean(axes, keepdim=True)
    else:
        scale = (weight - mean).abs().mean(axes, keepdim=True) * 4 / 3
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))
