"""The definition of choosing tokens by score."""

from __future__ import annotations

import torch

__all__ = ["rank_tokens"]


def rank_tokens(scores: torch.Tensor, *, prefix: int, r: int) -> torch.Tensor:
    """Return which tokens stay when those with the lowest scores go.

    Args:
        scores: ``[B, T]``.
        prefix: How many tokens at the front stay, whatever their score.
        r: Tokens to drop.

    Returns:
        ``[B, T - r]`` int64: the prefix, then the others by falling score, equal ones in their order.

    """
    B, T = scores.shape
    order = scores[:, prefix:].sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(prefix, device=scores.device).expand(B, -1)
    return torch.cat([first, prefix + order[:, : T - prefix - r]], 1)
