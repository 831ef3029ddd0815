"""The ONNX form of ``xf.ternary_weight``: arithmetic in floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def float_arithmetic(b: Builder, node: XfNode) -> ir.Value:
    """The definition, in the order of its operations."""
    weight, binary = node["weight"], node["bits"] == 1
    zero, one = b.scalar(0, weight), b.scalar(1, weight)
    axes = b.constant([1] if node["per_row"] else [0, 1], np.int64)
    centered = b.op("Sub", weight, b.op("ReduceMean", weight, axes, keepdims=1))
    mean = b.op("ReduceMean", b.op("Abs", weight if binary else centered), axes, keepdims=1)
    if not binary:
        mean = b.op("Div", b.op("Mul", mean, b.scalar(4, weight)), b.scalar(3, weight))
    scale = b.op("Where", b.op("Greater", mean, zero), mean, one)
    steps = b.op("Clip", b.op("Div", centered, scale), b.scalar(-1, weight), one)
    signs = b.op("Where", b.op("Less", steps, zero), b.scalar(-1, weight), one) if binary else None
    return b.op("Mul", signs or b.op("Round", steps), scale)


FORMS = (Form("float_arithmetic", float_arithmetic, is_standard=True),)
