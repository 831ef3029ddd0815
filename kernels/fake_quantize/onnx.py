"""The ONNX form of ``xf.fake_quantize``: arithmetic in floats, which no runtime mistakes for integer execution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def float_arithmetic(b: Builder, node: XfNode) -> ir.Value:
    """The definition, in the order of its operations."""
    x, bits = node["x"], node["bits"]
    last = b.scalar(2**bits - 1, x)
    if node["scale"] is None:
        scale, shift = _range_of(b, node, last)
    else:
        scale = node["scale"]
        zero = node["zero"]
        shift = b.scalar(2 ** (bits - 1), x) if zero is None else b.op("Cast", zero, to=int(x.dtype))
    steps = b.op("Max", b.op("Div", x, scale), b.op("Neg", shift))
    steps = b.op("Min", steps, b.op("Sub", last, shift))
    return b.op("Mul", b.op("Round", steps), scale)


def _range_of(b: Builder, node: XfNode, last: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return scale and zero point of the range of ``x``."""
    x = node["x"]
    zero, one = b.scalar(0, x), b.scalar(1, x)
    axes = b.constant([-1], np.int64) if node["per_token"] else None
    low = b.op("Min", b.op("ReduceMin", x, axes, keepdims=int(node["per_token"])), zero)
    high = b.op("Max", b.op("ReduceMax", x, axes, keepdims=int(node["per_token"])), zero)
    step = b.op("Div", b.op("Sub", high, low), last)
    scale = b.op("Where", b.op("Greater", high, low), step, one)
    shift = b.op("Round", b.op("Div", b.op("Neg", low), scale))
    return scale, b.op("Clip", shift, zero, last)


FORMS = (Form("float_arithmetic", float_arithmetic, is_standard=True),)
