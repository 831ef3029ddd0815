"""Packed codes in the operators of the ONNX standard: the counterpart of ``packing.py`` for forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder
from xformopt.kernels.packing import PERIODS, packed_size

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["codebook_weight", "dequantize_groups", "unpacked"]

_FLOAT, _INT64, _EVERY_AXIS = 1, 7, 0
# bytes whose number float32 holds exactly
_EXACT_BYTES = 3


def dequantize_groups(
    b: Builder,
    packed: ir.Value,
    scale: ir.Value,
    zero: ir.Value | None,
    *,
    axes: int,
    width: int,
    groups: int,
    bits: int,
) -> ir.Value:
    """Return ``(codes - zero) * scale`` in float32.

    Args:
        b: Where to emit.
        packed: uint8, ``[..., groups * bytes]`` with ``axes`` leading axes; each group begins on a byte.
        scale: ``[..., groups]``.
        zero: uint8, ``[..., ceil(groups * bits / 8)]``, or None where the middle code is zero.
        axes: See ``packed``.
        width: Codes in a row.
        groups: Groups in a row.
        bits: Of a code, one of ``packing.WIDTHS``.

    """
    leading = [_EVERY_AXIS] * axes
    size = width // groups
    blocks = b.reshape(packed, *leading, groups, packed_size(size, bits))
    codes = unpacked(b, blocks, axes + 1, bits, size)
    if zero is None:
        shift = b.constant(np.float32(2 ** (bits - 1)))
    else:
        shift = b.reshape(unpacked(b, zero, axes, bits, groups), *leading, groups, 1)
    values = b.op("Mul", b.op("Sub", codes, shift), b.reshape(scale, *leading, groups, 1))
    return b.reshape(values, *leading, width)


def codebook_weight(b: Builder, packed: ir.Value, table: np.ndarray, *, bits: int, width: int) -> ir.Value:
    """Return the matrix ``[O, width]`` of ``table[code]`` for packed codes ``[O, bytes]``."""
    codes = b.op("Cast", unpacked(b, packed, 1, bits, width), to=_INT64)
    return b.op("Gather", b.constant(table, np.float32), codes)


def unpacked(b: Builder, packed: ir.Value, axes: int, bits: int, count: int) -> ir.Value:
    """Return ``count`` codes as float32, ``[..., count]``, from bytes with ``axes`` leading axes.

    All bytes of a period are one number, below 2^24 and so exact; code j is what its division by ``2^(bits j)`` leaves.
    """
    floats = b.op("Cast", packed, to=_FLOAT)
    if bits == 8:
        return floats
    period, leading = PERIODS[bits], [_EVERY_AXIS] * axes
    if period > _EXACT_BYTES:
        digits = b.reshape(unpacked(b, packed, axes, 1, count * bits), *leading, count, bits)
        codes = b.op("MatMul", digits, b.constant(2.0 ** np.arange(bits).reshape(-1, 1), np.float32))
        return b.reshape(codes, *leading, count)
    if missing := -packed_size(count, bits) % period:
        floats = b.op("Pad", floats, b.constant([0] * (2 * axes + 1) + [missing], np.int64))
    parts = b.reshape(floats, *leading, -1, period)
    words = b.op("MatMul", parts, b.constant(256.0 ** np.arange(period).reshape(-1, 1), np.float32))
    places = np.arange(8 * period // bits)
    above = b.op("Floor", b.op("Mul", words, b.constant(0.5 ** (bits * places), np.float32)))
    higher = b.op("Floor", b.op("Mul", words, b.constant(0.5 ** (bits * (places + 1)), np.float32)))
    codes = b.op("Sub", above, b.op("Mul", higher, b.constant(np.float32(2**bits))))
    ends = [b.constant([number], np.int64) for number in (0, count, axes)]
    return b.op("Slice", b.reshape(codes, *leading, -1), *ends)
