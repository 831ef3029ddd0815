"""Softmax over the keys a query sees, where it may see none."""

from __future__ import annotations

import torch

__all__ = ["divided", "masked_softmax"]


def masked_softmax(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return weights that sum up to one over the visible keys of each row, or are zeros where there are none.

    Args:
        logits: ``[..., S]``.
        visible: Which of them count, broadcastable to the logits.

    """
    logits = logits.masked_fill(~visible, float("-inf"))
    # subtracting a finite maximum keeps rows without any key at zero instead of NaN
    peak = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    return divided(weights, weights.sum(-1, keepdim=True))


def divided(part: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return ``part / total``, and ``part`` where the total is zero: finite, and so are the gradients."""
    return part / torch.where(total > 0, total, 1.0)
