"""The ONNX form of ``xf.float_weight_linear``: codes are looked up in the table of the format's values.

Codes and scales are constants, so that ONNX Runtime makes the floating-point matrix once, when the model is loaded: the
file has few bits per weight, the session 32, and the product is one of floats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.float_formats import E8M0_VALUES, FORMATS
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_FLOAT, _FLOAT16, _INT32 = 1, 10, 6


def look_up(b: Builder, node: XfNode) -> ir.Value:
    """The weight in floats, then the product."""
    found = FORMATS[node["format"]]
    rows, groups = node.size("scale", 0), node.size("scale", 1)
    codes = b.reshape(_codes(b, node["weight"], found.bits), rows, groups, -1)
    values = b.op("Mul", _values(b, codes, found.values), b.reshape(_scales(b, node), rows, groups, 1))
    matrix = b.op("Transpose", b.reshape(values, rows, -1), perm=[1, 0])
    product = b.op("MatMul", node["x"], matrix)
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _scales(b: Builder, node: XfNode) -> ir.Value:
    scale, base = node["scale"], node["base"]
    if scale.dtype in (_FLOAT, _FLOAT16):
        return b.op("Cast", scale, to=_FLOAT)
    if base is None:
        return _values(b, scale, E8M0_VALUES)
    return b.op("Mul", _values(b, scale, FORMATS["fp8_e4m3"].values), base)


def _values(b: Builder, codes: ir.Value, table: tuple[float, ...]) -> ir.Value:
    """Return what uint8 codes stand for."""
    return b.op("Gather", b.constant(np.asarray(table, np.float32)), b.op("Cast", codes, to=_INT32))


def _codes(b: Builder, packed: ir.Value, bits: int) -> ir.Value:
    """Return packed codes ``[O, G, bytes]`` with one axis more or none, in their order."""
    if bits == 8:
        return packed
    apart = b.reshape(packed, 0, 0, -1, 1 if bits == 4 else 3)
    if bits == 4:
        parts = [_and(b, apart, 15), _shifted(b, apart, 4, "RIGHT")]
    else:
        first, second, third = b.ops("Split", apart, outputs=3, axis=3, num_outputs=3)
        parts = [
            _and(b, first, 63),
            _or(b, _shifted(b, first, 6, "RIGHT"), _shifted(b, _and(b, second, 15), 2, "LEFT")),
            _or(b, _shifted(b, second, 4, "RIGHT"), _shifted(b, _and(b, third, 3), 4, "LEFT")),
            _shifted(b, third, 2, "RIGHT"),
        ]
    return b.op("Concat", *parts, axis=3)


def _and(b: Builder, value: ir.Value, mask: int) -> ir.Value:
    return b.op("BitwiseAnd", value, b.constant(mask, np.uint8))


def _or(b: Builder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.op("BitwiseOr", one, other)


def _shifted(b: Builder, value: ir.Value, bits: int, direction: str) -> ir.Value:
    return b.op("BitShift", value, b.constant(bits, np.uint8), direction=direction)


FORMS = (Form("look_up", look_up, is_standard=True),)
