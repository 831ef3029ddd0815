"""The definition of a parameter in blocks of integers with scales that are powers of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xformopt.kernels.packing import unpack

__all__ = ["block_parameter"]


def block_parameter(
    codes: torch.Tensor, exponents: torch.Tensor, *, bits: int, block: int, shape: Sequence[int]
) -> torch.Tensor:
    """``(code - 2^(bits-1)) 2^exponent``, in float32.

    Args:
        codes: Packed codes of all values in order, uint8, ``[ceil(N * bits / 8)]``.
        exponents: int8, one for each block, ``[ceil(N / block)]``.
        bits: Of a code, 4 or 8.
        block: Values that share an exponent; those of the last block may be fewer.
        shape: Of the result, whose sizes multiply to N.

    Returns:
        float32 in ``shape``.

    """
    count = math.prod(shape)
    steps: torch.Tensor = unpack(codes, bits, count).float() - 2 ** (bits - 1)
    scales = torch.exp2(exponents.double()).float().repeat_interleave(block)[:count]
    return torch.mul(steps, scales).reshape(list(shape))
