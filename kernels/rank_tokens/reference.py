"""The definition of choosing tokens by score."""

from __future__ import annotations

import torch

from xformopt.kernels.token_counts import removed_tokens

__all__ = ["rank_tokens"]


def rank_tokens(scores: torch.Tensor, *, prefix: int, r: int = 0, percent: int = 0) -> torch.Tensor:
    """Return which tokens stay when those with the lowest scores go.

    Args:
        scores: ``[B, T]``.
        prefix: How many tokens at the front stay, whatever their score.
        r: Tokens to drop.
        percent: The same as a share of the tokens behind the prefix; 0: ``r`` counts.

    Returns:
        ``[B, T - r]`` int64: the prefix, then the others by falling score, equal ones in their order.

    """
    B, T = scores.shape
    r = removed_tokens(T, prefix, r, percent)
    order = scores[:, prefix:].sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(prefix, device=scores.device).expand(B, -1)
    return torch.cat([first, prefix + order[:, : T - prefix - r]], 1)
