"""The definition of a linear layer whose weight is stored in few bits."""

from __future__ import annotations

import torch

from xformopt.kernels.packing import dequantize_groups, unpack

__all__ = ["weight_only_linear"]


def weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> torch.Tensor:
    """``x W^T + bias`` with ``W = (codes - zero) * scale``, computed in the dtype of ``x``.

    Args:
        x: ``[..., I]``.
        weight: Packed codes, uint8, ``[O, G, ceil(I / G * bits / 8)]``: G groups of neighbouring input channels, each
            of which begins on a byte.
        scale: What one step is worth in each group, ``[O, G]``.
        zero: The code of zero in each group, packed uint8, ``[O, ceil(G * bits / 8)]``; without it ``2^(bits-1)``.
        bias: ``[O]``.
        bits: Of a code: 2, 3, 4, 6 or 8.

    Returns:
        ``[..., O]``.

    """
    codes = unpack(weight, bits, x.shape[-1] // weight.shape[1]).flatten(1)
    return torch.nn.functional.linear(x, dequantize_groups(codes, scale, zero, bits), bias)
