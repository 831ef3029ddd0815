"""The ONNX form of ``xf.fake_quantize_float``: the definition in operators of the standard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.float_formats import FORMATS, FloatFormat
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def compare_exponents(b: Builder, node: XfNode) -> ir.Value:
    """The step at each value is found by comparison with the powers of two, as ONNX does not tell an exponent."""
    x, found = node["x"], FORMATS[node["format"]]
    largest = b.scalar(found.largest, x)
    size = b.op("ReduceMax", b.op("Abs", x), b.constant([-1], np.int64), keepdims=1)
    ratio = b.op("Div", size, largest)
    scale = b.op("Where", b.op("Greater", ratio, b.scalar(0, x)), ratio, b.scalar(1, x))
    scaled = b.op("Clip", b.op("Div", x, scale), b.scalar(-found.largest, x), largest)
    step = _steps(b, scaled, found)
    return b.op("Mul", b.op("Mul", b.op("Round", b.op("Div", scaled, step)), step), scale)


def _steps(b: Builder, x: ir.Value, found: FloatFormat) -> ir.Value:
    """Return the distance of neighbours in the format at each value."""
    size = b.op("Abs", x)
    # an operator's result has no type of its own while the graph is built
    step = _power(b, found.smallest_exponent - found.mantissa)
    for exponent in range(found.smallest_exponent + 1, found.largest_exponent + 1):
        reached = b.op("GreaterOrEqual", size, _power(b, exponent))
        step = b.op("Where", reached, _power(b, exponent - found.mantissa), step)
    return step


def _power(b: Builder, exponent: int) -> ir.Value:
    return b.constant(np.float32(2.0**exponent))


FORMS = (Form("compare_exponents", compare_exponents, is_standard=True),)
