"""The definition of packing."""

from __future__ import annotations

import torch

__all__ = ["pack_tokens"]


def pack_tokens(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Put the tokens of a plan one after another (ByteTransformer, Zhai et al., arXiv 2210.03052).

    Args:
        x: ``[B, T, C]``, or ``[1, T, C]`` for values that are the same in every sequence.
        places: Place of each kept token, ``b * T + t``, ``[N]`` int64.

    Returns:
        ``[1, N, C]``.

    """
    rows = x.flatten(0, 1)
    return rows.index_select(0, places % rows.shape[0]).unsqueeze(0)
