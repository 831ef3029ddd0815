"""ONNX forms of ``xf.manhattan_attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def products(b: Builder, node: XfNode) -> ir.Value:
    """Two products and a softmax over all pairs, or over rows and then over columns."""
    heads, width, rows, columns = node["heads"], node.size("v", -1), node["rows"], node["columns"]
    scaled = b.op("Mul", node["q"], b.scalar(node["scale"], node["q"]))
    depths = (node.size("q", -1) // heads, node.size("k", -1) // heads, width // heads)
    given = list(zip((scaled, node["k"], node["v"]), depths, strict=True))
    across, down = (abs(np.arange(n)[:, None] - np.arange(n)) for n in (columns, rows))
    if not node["decomposed"]:
        q, k, v = (b.op("Transpose", b.reshape(x, 0, 0, heads, D), perm=[0, 2, 1, 3]) for x, D in given)
        dtype = node["q"].dtype.numpy()
        parts = b.constant(down[:, None, :, None], dtype), b.constant(across[None, :, None, :], dtype)
        distance = b.reshape(b.op("Add", *parts), rows * columns, rows * columns)
        attended = _decayed(b, node, q, k, v, distance)
        return b.reshape(b.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, 0, width)
    cut = [b.reshape(x, 0, rows, columns, heads, D) for x, D in given]
    # [B, R, H, C, D], and queries and keys once more as [B, C, H, R, D]
    q, k, v = (b.op("Transpose", x, perm=[0, 1, 3, 2, 4]) for x in cut)
    mixed = _decayed(b, node, q, k, v, b.constant(across, node["q"].dtype.numpy()))
    q, k = (b.op("Transpose", x, perm=[0, 2, 3, 1, 4]) for x in cut[:2])
    v = b.op("Transpose", mixed, perm=[0, 3, 2, 1, 4])
    attended = _decayed(b, node, q, k, v, b.constant(down, node["q"].dtype.numpy()))
    return b.reshape(b.op("Transpose", attended, perm=[0, 3, 1, 2, 4]), 0, rows * columns, width)


FORMS = (Form("products", products, is_standard=True),)


def _decayed(b: Builder, node: XfNode, q: ir.Value, k: ir.Value, v: ir.Value, distance: ir.Value) -> ir.Value:
    axes = 5 if node["decomposed"] else 4
    swapped = [*range(axes - 2), axes - 1, axes - 2]
    logits = b.op("MatMul", q, b.op("Transpose", k, perm=swapped))
    decay = b.op("Exp", b.op("Mul", b.reshape(node["log_decay"], node["heads"], 1, 1), distance))
    return b.op("MatMul", b.op("Mul", b.op("Softmax", logits, axis=-1), decay), v)
