"""The definition of RMS normalization."""

from __future__ import annotations

import torch

__all__ = ["rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float, groups: int = 1) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``[..., C]``.
        weight: ``[C / groups]``, shared by the groups.
        eps: Added to the mean of squares.
        groups: Equal parts of the last axis that are normalized apart: the heads of a norm on queries or keys.

    Returns:
        ``[..., C]``.

    """
    parts: torch.Tensor = x.unflatten(-1, (groups, -1))
    normalized = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return (normalized if weight is None else normalized * weight).flatten(-2)
