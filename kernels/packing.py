"""Codes of 4 or 8 bits in bytes: the storage of quantized weights, in the layout of ONNX Runtime's block formats."""

from __future__ import annotations

import torch

__all__ = ["dequantize_groups", "pack", "packed_size", "unpack"]


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes hold ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes in ``[0, 2^bits)`` along the last axis: of two codes in a byte the first has the low bits.

    Args:
        codes: uint8, ``[..., N]``; an odd number of 4-bit codes is filled up with 0.
        bits: 4 or 8.

    Returns:
        uint8, ``[..., packed_size(N, bits)]``.

    """
    if bits == 8:
        return codes.clone()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` codes of :func:`pack` as uint8, ``[..., count]``."""
    if bits == 8:
        return packed[..., :count]
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]


def dequantize_groups(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Return ``(codes - zero) * scale``, a scale and a zero point for every group of neighbours in a row.

    Args:
        codes: uint8, not packed, ``[..., N]``.
        scale: ``[..., G]``, where G divides N.
        zero: uint8, packed along the last axis, ``[..., packed_size(G, bits)]``; without it the middle code is zero.
        bits: 4 or 8.

    Returns:
        ``[..., N]`` in the dtype of ``scale``.

    """
    groups = scale.shape[-1]
    grouped = codes.reshape(*codes.shape[:-1], groups, -1).to(scale.dtype)
    middle = 2 ** (bits - 1)
    shift = middle if zero is None else unpack(zero, bits, groups).to(scale.dtype).unsqueeze(-1)
    return ((grouped - shift) * scale.unsqueeze(-1)).flatten(-2)
