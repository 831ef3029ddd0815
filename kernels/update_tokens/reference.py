"""The definition of replacing tokens."""

from __future__ import annotations

import torch

__all__ = ["update_tokens"]


def update_tokens(stored: torch.Tensor, kept: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return ``stored`` with some of its tokens replaced: a token buffer (Dutson et al., arXiv 2308.13494, 4.1).

    Args:
        stored: ``[B, T, C]``.
        kept: Which tokens are replaced, ``[B, N]`` int64; one that is named twice has the same new value twice.
        tokens: Their new values, ``[B, N, C]``.

    Returns:
        ``[B, T, C]``.

    """
    return stored.scatter(1, kept.unsqueeze(2).expand(-1, -1, stored.shape[2]), tokens)
