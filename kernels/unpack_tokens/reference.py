"""The definition of unpacking."""

from __future__ import annotations

import torch

__all__ = ["unpack_tokens"]


def unpack_tokens(x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put packed tokens back to their places, and zeros everywhere else.

    Args:
        x: ``[1, N, C]``.
        places: Place of each token in the batch, ``b * T + t``, ``[N]`` int64.
        mask: What the plan was made of, ``[B, T]``: only its shape is read.

    Returns:
        ``[B, T, C]``.

    """
    B, T = mask.shape
    rows = x.new_zeros(B * T, x.shape[2]).index_copy(0, places, x[0])
    return rows.view(B, T, x.shape[2])
