"""The definition of a table of embeddings stored in few bits."""

from __future__ import annotations

import torch

from xformopt.kernels.packing import dequantize_groups, unpack

__all__ = ["quantized_embedding"]


def quantized_embedding(
    weight: torch.Tensor, indices: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, bits: int
) -> torch.Tensor:
    """Rows ``indices`` of the table ``(codes - zero) * scale``.

    Args:
        weight: Packed codes, uint8, ``[V, C * bits / 8]``.
        indices: int64 or int32, ``[...]``.
        scale: What one step is worth in each row and group of neighbouring channels, ``[V, G]``.
        zero: The code of zero in each group, packed uint8, ``[V, ceil(G * bits / 8)]``; without it ``2^(bits-1)``.
        bits: Of a code, 4 or 8.

    Returns:
        ``[..., C]`` in the dtype of ``scale``.

    """
    codes = unpack(weight[indices], bits, weight.shape[1] * 8 // bits)
    return dequantize_groups(codes, scale[indices], None if zero is None else zero[indices], bits)
