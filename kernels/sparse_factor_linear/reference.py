"""The definition of a linear layer whose weight is sparse times dense (DSFormer, Chand et al., arXiv 2312.13211)."""

from __future__ import annotations

import torch

from xformopt.kernels.packing import unpack

__all__ = ["sparse_factor_linear"]


def sparse_factor_linear(
    x: torch.Tensor,
    basis: torch.Tensor,
    places: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> torch.Tensor:
    """``x W^T + bias`` with ``W = C basis``; each row of C has exactly K entries that may differ from zero.

    Args:
        x: ``[..., I]``.
        basis: ``[M, I]``, M at most ``2^bits``.
        places: The columns of the entries of each row of C, distinct; packed uint8, ``[O, ceil(K * bits / 8)]``.
        values: The entries, ``[O, K]``.
        bias: ``[O]``.
        bits: Of a place: 1, 2, 3, 4, 5, 6 or 8.

    Returns:
        ``[..., O]``.

    """
    chosen = unpack(places, bits, values.shape[1]).long()
    empty = values.new_zeros(len(values), len(basis))
    coefficients = empty.scatter_add(1, chosen, values)  # [O, M]
    return torch.nn.functional.linear(torch.nn.functional.linear(x, basis), coefficients, bias)
