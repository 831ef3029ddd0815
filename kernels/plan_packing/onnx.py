"""The ONNX form of ``xf.plan_packing``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import ascending

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_INT64 = 7  # TensorProto.INT64


def nonzero(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value, ir.Value]:
    """NonZero lists sequence after sequence; with guests, those of each behind its other tokens."""
    mask, zero, one = node["mask"], b.constant(0, np.int64), b.constant([1], np.int64)
    length = b.size(mask, 1)
    keys = lengths = _count(b, mask)
    if node["front"]:
        is_front = b.op("Less", ascending(b, zero, length), b.constant(node["front"], np.int64))
        guests = b.op("And", b.op("Not", mask), is_front)
        lengths = b.op("Add", keys, _count(b, guests))
        mask = b.op("Concat", b.op("Unsqueeze", mask, one), b.op("Unsqueeze", guests, one), axis=1)
    found = b.op("NonZero", mask)
    rows, columns = (
        b.op("Gather", found, b.constant(axis, np.int64), axis=0) for axis in (0, 2 if node["front"] else 1)
    )
    places = b.op("Add", b.op("Mul", rows, length), columns)
    offsets = b.op("Concat", b.constant([0], np.int64), b.op("CumSum", lengths, zero), axis=0)
    return places, offsets, keys


def _count(b: Builder, mask: ir.Value) -> ir.Value:
    """Return how many are true of each sequence, ``[B]``."""
    return b.op("ReduceSum", b.op("Cast", mask, to=_INT64), b.constant([1], np.int64), keepdims=0)


FORMS = (Form("nonzero", nonzero, is_standard=True),)
