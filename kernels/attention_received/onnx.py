"""The ONNX form of ``xf.attention_received``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# far below any logit, and far enough above the lowest number that a sum stays finite
_HIDDEN = {2: -3.0e4, 4: -1.0e30, 8: -1.0e30}


def matmul_softmax(b: Builder, node: XfNode) -> ir.Value:
    """The definition: a product, a softmax, a mean."""
    q, heads, first = node["q"], node["heads"], node["first"]
    group, depth = heads // node["kv_heads"], node.size("q", 2) // heads
    if first:
        q = b.op("Slice", q, *(b.constant([end], np.int64) for end in (0, first, 1)))
    scaled = b.op("Mul", b.reshape(q, 0, 0, heads, depth), b.scalar(node["scale"], node["q"]))
    k = b.reshape(node["k"], 0, 0, node["kv_heads"], 1, depth) if group > 1 else node["k"]
    if group > 1:
        k = b.op("Expand", k, b.constant([1, 1, 1, group, 1], np.int64))
    keys = b.op(
        "Transpose", b.reshape(k, 0, -1, heads, depth) if group == 1 else _joined(b, k, heads, depth), perm=[0, 2, 3, 1]
    )
    logits = b.op("MatMul", b.op("Transpose", scaled, perm=[0, 2, 1, 3]), keys)  # [B, H, T, S]
    if node["key_log_size"] is not None:
        logits = b.op("Add", logits, b.op("Unsqueeze", node["key_log_size"], b.constant([1, 2], np.int64)))
    mask, zero = node["key_mask"], b.scalar(0.0, node["q"])
    axes = b.constant([1, 2], np.int64)
    if mask is None:
        return b.op("ReduceMean", b.op("Softmax", logits, axis=-1), axes, keepdims=0)
    hidden = b.scalar(_HIDDEN[node["q"].dtype.itemsize], node["q"])
    logits = b.op("Where", b.op("Unsqueeze", mask, axes), logits, hidden)
    exists = b.op("Cast", mask, to=int(node["q"].dtype))
    counted = b.op("Slice", exists, *(b.constant([end], np.int64) for end in (0, first, 1))) if first else exists
    rows = b.op("Unsqueeze", counted, b.constant([1, 3], np.int64))
    total = b.op("ReduceSum", b.op("Mul", b.op("Softmax", logits, axis=-1), rows), axes, keepdims=0)
    number = b.op("Max", b.op("ReduceSum", counted, b.constant([1], np.int64), keepdims=1), b.scalar(1.0, node["q"]))
    mean = b.op("Div", total, b.op("Mul", number, b.scalar(float(heads), node["q"])))
    return b.op("Where", mask, mean, zero)


def _joined(b: Builder, k: ir.Value, heads: int, depth: int) -> ir.Value:
    return b.reshape(k, 0, 0, heads, depth)


FORMS = (Form("matmul_softmax", matmul_softmax, is_standard=True),)
