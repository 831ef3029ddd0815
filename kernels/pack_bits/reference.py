"""The definition of bits eight to a byte, the first in the lowest place."""

from __future__ import annotations

import torch

from xformopt.kernels.packing import pack

__all__ = ["pack_bits"]


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Put eight neighbours of the last axis in one byte; the last byte is filled up with zeros.

    Args:
        bits: bool, ``[..., N]``.

    Returns:
        uint8, ``[..., ceil(N / 8)]``.

    """
    return pack(bits.to(torch.uint8), 1)
