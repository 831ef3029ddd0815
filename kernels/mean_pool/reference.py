"""The definition of masked mean pooling."""

from __future__ import annotations

import torch

__all__ = ["mean_pool"]


def mean_pool(x: torch.Tensor, mask: torch.Tensor, *, eps: float) -> torch.Tensor:
    """``sum_t mask_t x_t / max(sum_t mask_t, eps)`` with x ``[B, T, C]`` and mask ``[B, T]``; returns ``[B, C]``."""
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=eps)
