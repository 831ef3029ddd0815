"""ONNX forms of ``xf.rms_norm``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.layer_norm.onnx import in_groups
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def rms_normalization(b: Builder, node: XfNode) -> ir.Value:
    """The standard operator, over groups where there are several."""
    weight = _weight(b, node)

    def normalize(parts: ir.Value) -> ir.Value:
        return b.op("RMSNormalization", parts, weight, axis=-1, epsilon=node["eps"])

    return in_groups(b, node, normalize)


def formula(b: Builder, node: XfNode) -> ir.Value:
    """The definition, in elementwise operators and one mean."""
    weight = None if node["weight"] is None else _weight(b, node)

    def normalize(parts: ir.Value) -> ir.Value:
        mean = b.op("ReduceMean", b.op("Mul", parts, parts), b.constant([-1], np.int64), keepdims=1)
        root = b.op("Sqrt", b.op("Add", mean, b.scalar(node["eps"], node["x"])))
        normalized = b.op("Div", parts, root)
        return normalized if weight is None else b.op("Mul", normalized, weight)

    return in_groups(b, node, normalize)


def _weight(b: Builder, node: XfNode) -> ir.Value:
    weight: ir.Value | None = node["weight"]
    if weight is not None:
        return weight
    return b.constant(np.ones(node.size("x", -1) // node["groups"]), node["x"].dtype.numpy())


FORMS = (
    Form("rms_normalization", rms_normalization, is_standard=True),
    Form("formula", formula, is_standard=True),
)
