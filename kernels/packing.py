"""Codes of few bits in bytes: the storage of quantized weights.

Code i has the bits ``i * bits`` to ``(i + 1) * bits - 1`` of the row, counted from the lowest bit of its first byte; of
4 and 8 bits that is the layout of ONNX Runtime's block formats.
"""

from __future__ import annotations

import torch

__all__ = ["PERIODS", "WIDTHS", "dequantize_groups", "pack", "packed_size", "unpack"]

# bytes after which codes begin on a byte again, by the bits of a code
PERIODS = {1: 1, 2: 1, 3: 3, 4: 1, 5: 5, 6: 3, 8: 1}
# bits of codes that stand for evenly spaced levels
WIDTHS = (2, 3, 4, 6, 8)


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes hold ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes in ``[0, 2^bits)`` along the last axis; the last byte is filled up with 0.

    Args:
        codes: uint8, ``[..., N]``.
        bits: One of ``PERIODS``.

    Returns:
        uint8, ``[..., packed_size(N, bits)]``.

    """
    if bits == 8:
        return codes.clone()
    count, period = codes.shape[-1], PERIODS[bits]
    places = torch.arange(0, 8 * period, bits, dtype=torch.int64, device=codes.device)
    grouped = torch.nn.functional.pad(codes, (0, -count % len(places))).unflatten(-1, (-1, len(places)))
    words = (grouped.to(torch.int64) << places).sum(-1, keepdim=True, dtype=torch.int64)
    found: torch.Tensor = words >> torch.arange(0, 8 * period, 8, dtype=torch.int64, device=codes.device) & 255
    return found.flatten(-2)[..., : packed_size(count, bits)].to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` codes of :func:`pack` as uint8, ``[..., count]``."""
    if bits == 8:
        return packed[..., :count]
    period = PERIODS[bits]
    starts = torch.arange(0, 8 * period, 8, dtype=torch.int64, device=packed.device)
    grouped = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % period)).unflatten(-1, (-1, period))
    words = (grouped.to(torch.int64) << starts).sum(-1, keepdim=True, dtype=torch.int64)
    places = torch.arange(0, 8 * period, bits, dtype=torch.int64, device=packed.device)
    codes: torch.Tensor = words >> places & 2**bits - 1
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def dequantize_groups(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Return ``(codes - zero) * scale``, a scale and a zero point for every group of neighbours in a row.

    Args:
        codes: uint8, not packed, ``[..., N]``.
        scale: ``[..., G]``, where G divides N.
        zero: uint8, packed along the last axis, ``[..., packed_size(G, bits)]``; without it the middle code is zero.
        bits: One of ``WIDTHS``.

    Returns:
        ``[..., N]`` in the dtype of ``scale``.

    """
    groups = scale.shape[-1]
    grouped = codes.reshape(*codes.shape[:-1], groups, -1).to(scale.dtype)
    middle = 2 ** (bits - 1)
    shift = middle if zero is None else unpack(zero, bits, groups).to(scale.dtype).unsqueeze(-1)
    return ((grouped - shift) * scale.unsqueeze(-1)).flatten(-2)
