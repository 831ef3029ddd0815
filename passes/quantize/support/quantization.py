"""Rounding weights to codes: the arithmetic that quantization passes share.  Halves are rounded to even."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from xformopt.kernels.packing import pack
from xformopt.rewrite import Editor

__all__ = ["GroupCodes", "PackedGroups", "check_groups", "dequantized", "quantize_groups", "quantize_rows"]


@dataclass(frozen=True)
class GroupCodes:
    """A matrix in codes of few bits, with a scale for each group of neighbours in a row.

    Attributes:
        codes: uint8, one code per byte, ``[O, I]``.
        scale: What one step is worth, ``[O, G]``.
        zero: uint8, the code of zero, one per byte, ``[O, G]``; None where it is ``2^(bits-1)``.
        bits: Of a code.

    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int

    def packed(self) -> PackedGroups:
        """Return the codes and zero points in bytes, group after group."""
        blocks = pack(self.codes.unflatten(1, (self.scale.shape[1], -1)), self.bits).contiguous()
        return PackedGroups(blocks, self.scale, None if self.zero is None else pack(self.zero, self.bits).contiguous())

    def rows(self, start: int, end: int) -> GroupCodes:
        """Return rows ``start`` to ``end - 1``."""
        zero = None if self.zero is None else self.zero[start:end]
        return replace(self, codes=self.codes[start:end], scale=self.scale[start:end].contiguous(), zero=zero)


@dataclass(frozen=True)
class PackedGroups:
    """:class:`GroupCodes` as stored: ``weight`` uint8 ``[O, G, bytes]``, ``scale``, ``zero`` uint8 ``[O, bytes]``."""

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def as_rows(self) -> PackedGroups:
        """Return the same with the groups of a row joined, ``weight`` as ``[O, bytes]``."""
        return replace(self, weight=self.weight.flatten(1))

    def parameters(self, editor: Editor, name: str) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Return the nodes that read codes, scales and zero points, stored under ``name``."""
        weight = editor.parameter(f"{name}.codes", self.weight)
        scale = editor.parameter(f"{name}.scale", self.scale)
        return weight, scale, None if self.zero is None else editor.parameter(f"{name}.zero", self.zero)


def check_groups(bits: int, group: int) -> None:
    """Raise ValueError for options that no kernel takes."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, but is {bits}")
    if group not in (16, 32, 64, 128, 256):
        raise ValueError(f"group must be 16, 32, 64, 128 or 256, but is {group}")


def quantize_rows(weight: torch.Tensor, *, reduce_range: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to signed codes with one scale per row: ``scale = max|w| / 127``.

    Args:
        weight: ``[O, I]``.
        reduce_range: Use codes within 63 instead of 127, which 16-bit accumulators of x86 without VNNI can add.

    Returns:
        int8 codes ``[O, I]``, and scales ``[O]`` in the dtype of ``weight`` (1 for a row of zeros).

    """
    limit = 63 if reduce_range else 127
    scale = _positive(weight.abs().amax(1) / limit)
    codes = (weight / scale.unsqueeze(1)).round().clamp(-limit, limit)
    return codes.to(torch.int8), scale


def quantize_groups(weight: torch.Tensor, *, bits: int, group: int, symmetric: bool) -> GroupCodes:
    """Round a matrix to unsigned codes with one scale per row and group of ``group`` neighbours (round to nearest).

    Symmetric: ``scale = max|w| / (2^(bits-1) - 1)``, zero at the middle code.  Asymmetric: the range from the smallest
    to the largest weight, widened to hold zero.  A group of zeros has scale 1.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // group, group)
    last = 2**bits - 1
    if symmetric:
        scale = _positive(grouped.abs().amax(2) / (2 ** (bits - 1) - 1))
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = _positive((high - low) / last)
        zero = (-low / scale).round().clamp(0, last)
    codes = ((grouped / scale.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, last)
    stored = None if symmetric else zero.to(torch.uint8)
    return GroupCodes(codes.reshape(rows, columns).to(torch.uint8), scale, stored, bits)


def dequantized(found: GroupCodes) -> torch.Tensor:
    """Return the matrix that codes stand for, ``[O, I]``."""
    rows, groups = found.scale.shape
    zero = 2 ** (found.bits - 1) if found.zero is None else found.zero.unsqueeze(2).to(found.scale.dtype)
    grouped = found.codes.reshape(rows, groups, -1).to(found.scale.dtype)
    return ((grouped - zero) * found.scale.unsqueeze(2)).reshape(rows, -1)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
