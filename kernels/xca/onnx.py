"""ONNX forms of ``xf.xca``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import hide
from xformopt.kernels.xca.reference import EQUAL

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_END = 1 << 40


def products(b: Builder, node: XfNode) -> ir.Value:
    """Two products; lengths divide the small matrix of weights instead of queries and keys."""
    heads, width = node["heads"], node.size("v", -1)
    D = width // heads
    names = ("q", "k", "v")
    given = [node[name] for name in names]
    if node["key_mask"] is not None:
        exists = b.op("Unsqueeze", node["key_mask"], b.constant([-1], np.int64))
        given = [b.op("Where", exists, x, b.scalar(0.0, node["q"])) for x in given]
    # channels in rows: [B, H, D, T]
    q, k, v = (b.op("Transpose", b.reshape(x, 0, 0, heads, D), perm=[0, 2, 3, 1]) for x in given)
    keys = b.op("Transpose", k, perm=[0, 1, 3, 2])
    lengths = b.op("Mul", _lengths(b, node, q), b.op("Transpose", _lengths(b, node, k), perm=[0, 1, 3, 2]))
    scaled = b.op("Mul", b.op("MatMul", q, keys), b.reshape(node["temperature"], heads, 1, 1))
    logits = b.op("Div", scaled, lengths)
    if node["top"]:
        best = b.ops("TopK", logits, b.constant([node["top"]], np.int64), outputs=2, axis=-1)[0]
        last = b.constant([-1], np.int64)
        least = b.op("Sub", b.op("Slice", best, last, b.constant([_END], np.int64), last), b.scalar(EQUAL, node["q"]))
        logits = hide(b, logits, b.op("GreaterOrEqual", logits, least), node["q"])
    mixed = b.op("MatMul", b.op("Softmax", logits, axis=-1), v)
    return b.reshape(b.op("Transpose", mixed, perm=[0, 3, 1, 2]), 0, 0, width)


def _lengths(b: Builder, node: XfNode, x: ir.Value) -> ir.Value:
    """Return the length of each channel over the tokens, ``[B, H, D, 1]``."""
    lengths = b.op("ReduceL2", x, b.constant([-1], np.int64), keepdims=1)
    return b.op("Max", lengths, b.scalar(node["eps"], node["q"]))


FORMS = (Form("products", products, is_standard=True),)
