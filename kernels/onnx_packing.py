"""Packed codes in the operators of the ONNX standard: the counterpart of ``packing.py`` for forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["dequantize_groups"]

_FLOAT, _EVERY_AXIS = 1, 0


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
        packed: uint8, ``[..., width * bits / 8]`` with ``axes`` leading axes.
        scale: ``[..., groups]``.
        zero: uint8, ``[..., ceil(groups * bits / 8)]``, or None where the middle code is zero.
        axes: See ``packed``.
        width: Codes in a row.
        groups: Groups in a row.
        bits: Of a code, 4 or 8.

    """
    leading = [_EVERY_AXIS] * axes
    codes = b.reshape(_unpacked(b, packed, axes, bits), *leading, groups, width // groups)
    if zero is None:
        shift = b.constant(np.float32(2 ** (bits - 1)))
    else:
        bounds = [b.constant([number], np.int64) for number in (0, groups, axes)]
        shift = b.reshape(b.op("Slice", _unpacked(b, zero, axes, bits), *bounds), *leading, groups, 1)
    values = b.op("Mul", b.op("Sub", codes, shift), b.reshape(scale, *leading, groups, 1))
    return b.reshape(values, *leading, width)


def _unpacked(b: Builder, packed: ir.Value, axes: int, bits: int) -> ir.Value:
    """Return codes as float32, ``[..., N]``."""
    if bits == 8:
        return b.op("Cast", packed, to=_FLOAT)
    low = b.op("BitwiseAnd", packed, b.constant(15, np.uint8))
    high = b.op("BitShift", packed, b.constant(4, np.uint8), direction="RIGHT")
    last = b.constant([axes + 1], np.int64)
    pairs = b.op("Concat", b.op("Unsqueeze", low, last), b.op("Unsqueeze", high, last), axis=axes + 1)
    codes = b.reshape(pairs, *[_EVERY_AXIS] * axes, -1)
    return b.op("Cast", codes, to=_FLOAT)
