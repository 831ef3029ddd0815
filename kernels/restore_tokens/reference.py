"""The definition of restoring merged tokens."""

from __future__ import annotations

import torch

__all__ = ["restore_tokens"]


def restore_tokens(
    x: torch.Tensor, kept: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor
) -> torch.Tensor:
    """Copy every merged token to the places of those it was made of ("unmerge" of ToMe, arXiv 2210.09461).

    Args:
        x: ``[B, N, C]``.
        kept: Place of each in the longer sequence, ``[B, N]`` int64.
        sources: Places of the tokens that were merged away, ``[B, R]``.
        destinations: Place in ``kept`` of the token that each of them joined, ``[B, R]``.

    Returns:
        ``[B, N + R, C]``.

    """
    B, N = kept.shape
    own = torch.arange(N, device=x.device).expand(B, -1)
    every = torch.cat([kept, sources], 1)
    places = torch.zeros_like(every).scatter(1, every, torch.cat([own, destinations], 1))
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))
