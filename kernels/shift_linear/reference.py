"""The definition of a linear layer whose weights are signed powers of two (ShiftAddViT, arXiv 2306.06446; DeepShift).

A processor that shifts would multiply by none of them.  Here the weights are stored as sign and exponent, and the
product is computed in floating point.
"""

from __future__ import annotations

import torch

from xformopt.kernels.packing import unpack

__all__ = ["power_table", "shift_linear"]


def shift_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int, top: int
) -> torch.Tensor:
    """``x W^T + bias`` with ``W = (-1)^sign 2^(top - (last - k))``, and 0 where the exponent's code k is 0.

    Args:
        x: ``[..., I]``.
        weight: Packed codes, uint8, ``[O, ceil(I * bits / 8)]``: sign in the highest bit, k from 0 to last below it.
        bias: ``[O]``.
        bits: Of a code: the sign and an exponent of 4 or 5 bits, whose last code is ``2^(bits-1) - 1``.
        top: Exponent of the largest weight.

    Returns:
        ``[..., O]``.

    """
    codes = unpack(weight, bits, x.shape[-1])
    table = power_table(bits, top).to(x)
    return torch.nn.functional.linear(x, table[codes.long()], bias)


def power_table(bits: int, top: int) -> torch.Tensor:
    """Return the weight that each code stands for, float64 ``[2^bits]``."""
    last = 2 ** (bits - 1) - 1
    powers = torch.exp2(torch.arange(last + 1, dtype=torch.float64) + (top - last))
    powers[0] = 0
    return torch.cat((powers, -powers))
