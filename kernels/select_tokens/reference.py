"""The definition of taking tokens."""

from __future__ import annotations

import torch

__all__ = ["select_tokens"]


def select_tokens(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the tokens of ``x`` ``[B, T, C]`` at ``kept`` ``[B, N]`` (int64), in that order: ``[B, N, C]``."""
    return x.gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))
