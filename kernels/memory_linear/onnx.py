"""The ONNX form of ``xf.memory_linear``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_FLOAT, _INT64 = 1, 7


def gathered_rows(b: Builder, node: XfNode) -> ir.Value:
    """Places by a product with powers of two, the rows by one gather, their sum by a product with p."""
    x, axes = node["x"], len(node.shape("x")) - 1
    count, entries, outputs = (node.size("tables", axis) for axis in range(3))
    width, last = node.size("x", -1) // count, b.constant([-1], np.int64)
    leading = [0] * axes
    parts = b.reshape(x, *leading, count, width)
    signs = b.op("Cast", b.op("GreaterOrEqual", parts, b.scalar(0.0, x)), to=_FLOAT)
    powers = b.constant(2.0 ** np.arange(width).reshape(width, 1), np.float32)
    places = b.reshape(b.op("Cast", b.op("MatMul", signs, powers), to=_INT64), *leading, count)
    rows = b.op(
        "Gather",
        b.reshape(node["tables"], count * entries, outputs),
        b.op("Add", places, b.constant(np.arange(count) * entries, np.int64)),
    )
    sharp = b.op("Mul", b.op("Abs", parts), b.scalar(2 / node["temperature"], x))
    sureness = b.op("ReduceProd", b.op("Sigmoid", sharp), last, keepdims=0)
    weights = b.reshape(sureness, *leading, 1, count)
    summed = b.reshape(b.op("MatMul", weights, rows), *leading, outputs)
    return summed if node["bias"] is None else b.op("Add", summed, node["bias"])


FORMS = (Form("gathered_rows", gathered_rows, is_standard=True),)
