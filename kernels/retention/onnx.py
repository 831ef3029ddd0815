"""ONNX forms of ``xf.retention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks, product_with_transposed, states
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def chunked(b: Builder, node: XfNode) -> ir.Value:
    """Chunkwise, a Scan hands the states from chunk to chunk.

    The decays are constant, so that the states of all chunks could be one product with a matrix of powers; but its cost
    grows with the square of their number.
    """
    heads, width = node["heads"], node.size("v", -1)
    D, E = node.size("q", -1) // heads, width // heads
    scaled = b.op("Mul", node["q"], b.scalar(node["scale"], node["q"]))
    q, k, v = (heads_in_chunks(b, x, heads, d) for x, d in ((scaled, D), (node["k"], D), (node["v"], E)))
    at = np.arange(CHUNK)
    between = at[:, None] - at
    weights = b.op("Mul", product_with_transposed(b, q, k), _powers(b, node, between))
    inside = b.op("MatMul", weights, v)
    decayed = b.op("Mul", k, _powers(b, node, CHUNK - 1 - at[:, None]))
    added = b.op("MatMul", b.op("Transpose", decayed, perm=[0, 1, 2, 4, 3]), v)  # [B, H, N, D, E]
    kept = b.op("Exp", b.op("Mul", _per_head(b, node, 3), b.scalar(CHUNK, node["q"])))
    each = b.op(
        "Expand", kept, b.op("Concat", b.op("Shape", added, start=2, end=3), b.constant([1, 1], np.int64), axis=0)
    )
    decay = b.op("Unsqueeze", each, b.constant([0], np.int64))  # [1, H, N, 1, 1]
    added.type = decay.type = node["q"].type
    before = states(b, added, decay, heads, D, E)
    reading = b.op("MatMul", b.op("Mul", q, _powers(b, node, at[:, None] + 1)), before)
    return from_chunks(b, b.op("Add", inside, reading), node["q"], width)


def _powers(b: Builder, node: XfNode, steps: np.ndarray) -> ir.Value:
    """Return ``gamma ** steps`` of each head, ``[H, 1, *steps.shape]``, zero where the steps are negative."""
    dtype = node["q"].dtype.numpy()
    exponents = b.op("Mul", _per_head(b, node, 3), b.constant(np.maximum(steps, 0), dtype))
    powers = b.op("Exp", exponents)
    return powers if (steps >= 0).all() else b.op("Mul", powers, b.constant(steps >= 0, dtype))


def _per_head(b: Builder, node: XfNode, behind: int) -> ir.Value:
    """Return the log decays with axes of size one behind that of the heads."""
    return b.reshape(node["log_decay"], node["heads"], *[1] * behind)


FORMS = (Form("chunked", chunked, is_standard=True),)
