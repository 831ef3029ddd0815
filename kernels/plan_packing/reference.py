"""The definition of a plan for packing."""

from __future__ import annotations

import torch

__all__ = ["plan_packing"]


def plan_packing(mask: torch.Tensor, *, front: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number the tokens that are kept, sequence after sequence (ByteTransformer, Zhai et al., arXiv 2210.03052).

    Kept are the tokens of the mask, and those among the first ``front`` of each sequence that the mask leaves out:
    they are read by their place, ask for keys and are none, and stand behind the others of their sequence.

    Args:
        mask: Which tokens are not padding, ``[B, T]`` bool.
        front: Tokens at the front that are kept whatever the mask says.

    Returns:
        Place of each kept token in the batch, ``b * T + t``, ``[N]`` int64; where each sequence begins among them, and
        where the last one ends, ``[B + 1]`` int64; how many tokens of each sequence the mask keeps, ``[B]`` int64.

    """
    T = mask.shape[1]
    guests = ~mask & (torch.arange(T, device=mask.device) < front)
    rows, _, columns = torch.stack([mask, guests], 1).nonzero(as_tuple=True)
    keys = mask.sum(1)
    ends = (keys + guests.sum(1)).cumsum(0)
    return rows * T + columns, torch.cat([ends.new_zeros(1), ends]), keys
