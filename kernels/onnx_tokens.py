"""Pieces of ONNX that the operators on shortened sequences share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ascending", "count", "gather_tokens", "into", "per_row", "take_every_other"]

_END = np.iinfo(np.int64).max


def count(b: Builder, node: XfNode, name: str) -> ir.Value:
    """Return how many tokens an operand has, as one element."""
    return b.size(node[name], 1)


def take_every_other(b: Builder, value: ir.Value, start: int) -> ir.Value:
    """Return every second entry of axis 1 from ``start`` on."""
    starts, ends, axes, steps = (b.constant([number], np.int64) for number in (start, _END, 1, 2))
    return b.op("Slice", value, starts, ends, axes, steps)


def ascending(b: Builder, start: ir.Value, end: ir.Value) -> ir.Value:
    """Return ``start, start + 1, ...`` below ``end``, which has one element: a constant where both are known."""
    if start.const_value is not None and end.const_value is not None:
        return b.constant(np.arange(int(start.const_value.numpy()), int(end.const_value.numpy().item())), np.int64)
    return b.op("Range", start, b.op("Squeeze", end), b.constant(1, np.int64))


def per_row(b: Builder, indices: ir.Value, like: ir.Value) -> ir.Value:
    """Repeat indices for each row of the batch of ``like``, ``[B, N]``."""
    return b.op("Expand", indices, b.op("Concat", b.size(like, 0), b.constant([1], np.int64), axis=0))


def gather_tokens(b: Builder, value: ir.Value, indices: ir.Value) -> ir.Value:
    """Return the named tokens of ``[B, T, C]``, whole rows at a time."""
    return b.op("GatherND", value, b.op("Unsqueeze", indices, b.constant([2], np.int64)), batch_dims=1)


def into(b: Builder, kept: ir.Value, sources: ir.Value, destinations: ir.Value) -> ir.Value:
    """Return for every token of the longer sequence its place in the shorter one, ``[B, T]``."""
    every = b.op("Concat", kept, sources, axis=1)
    places = per_row(b, ascending(b, b.constant(0, np.int64), b.op("Shape", kept, start=1, end=2)), kept)
    return b.op("ScatterElements", every, every, b.op("Concat", places, destinations, axis=1), axis=1)
