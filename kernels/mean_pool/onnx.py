"""ONNX forms of ``xf.mean_pool``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def matmul(b: Builder, node: XfNode) -> ir.Value:
    """The masked sum as a product ``[B, 1, T] x [B, T, C]``."""
    weights, count = _weights(b, node)
    total = b.op("MatMul", b.op("Unsqueeze", weights, b.constant([1], np.int64)), node["x"])
    return b.op("Div", b.op("Squeeze", total, b.constant([1], np.int64)), count)


def reduction(b: Builder, node: XfNode) -> ir.Value:
    """The masked sum as product and reduction."""
    weights, count = _weights(b, node)
    masked = b.op("Mul", node["x"], b.op("Unsqueeze", weights, b.constant([2], np.int64)))
    return b.op("Div", b.op("ReduceSum", masked, b.constant([1], np.int64), keepdims=0), count)


def _weights(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value]:
    x = node["x"]
    weights = b.op("Cast", node["mask"], to=int(x.dtype))
    total = b.op("ReduceSum", weights, b.constant([1], np.int64), keepdims=1)
    return weights, b.op("Max", total, b.scalar(node["eps"], x))


FORMS = (
    Form("matmul", matmul, is_standard=True),
    Form("reduction", reduction, is_standard=True),
)
