"""The definition of merging tokens."""

from __future__ import annotations

import torch

__all__ = ["merge_tokens"]


def merge_tokens(
    x: torch.Tensor,
    kept: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace tokens by their mean, weighted by size (Bolya et al., ToMe, arXiv 2210.09461).

    Args:
        x: ``[B, T, C]``.
        kept: Which tokens stay, ``[B, N]`` int64.
        sources: Which are merged away, ``[B, R]``, ``N + R = T``.
        destinations: Place in ``kept`` of the token that each of them joins, ``[B, R]``.
        sizes: How many tokens each one stands for, ``[B, T]``; None: 1; 0: it is padding and does not count.

    Returns:
        The merged tokens ``[B, N, C]`` in the order of ``kept``, and their sizes ``[B, N]``.  Padding that is merged
        with padding is 0.

    """
    if sizes is None:
        sizes = x.new_ones(x.shape[:2])
    total = sizes.gather(1, kept).scatter_add(1, destinations, sizes.gather(1, sources))
    weighted = x * sizes.unsqueeze(2)

    def rows(indices: torch.Tensor) -> torch.Tensor:
        return indices.unsqueeze(2).expand(-1, -1, x.shape[2])

    summed = weighted.gather(1, rows(kept)).scatter_add(1, rows(destinations), weighted.gather(1, rows(sources)))
    return summed / total.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(2), total
