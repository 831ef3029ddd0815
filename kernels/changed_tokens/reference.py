"""The definition of choosing tokens by how much they have changed."""

from __future__ import annotations

import torch

__all__ = ["changed_tokens"]


def changed_tokens(x: torch.Tensor, reference: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return the tokens with the largest ``||x - u||``: the top-r policy of a token gate (Dutson et al., arXiv
    2308.13494, section 4.1).

    Args:
        x: ``[B, T, C]``.
        reference: What the gate let through last at each place, u: ``[B, T, C]``.
        ranks: Which places of the ranking are wanted, ``[r]`` int64 in ``[0, T)``: 0, 1, ..., r - 1 for the top r.

    Returns:
        ``[B, r]`` int64, in the order of ``ranks``.  Of equally large changes, the token in front ranks first.

    """
    error = (x - reference).square().sum(2)  # [B, T]
    return error.sort(dim=1, descending=True, stable=True).indices.index_select(1, ranks)
