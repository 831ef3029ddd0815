"""ONNX forms of ``xf.retention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks, product_with_transposed
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def chunked(b: Builder, node: XfNode) -> ir.Value:
    """Chunkwise; the decays are constant, so the states of all chunks are one product with a matrix of powers."""
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
    flat = b.op("MatMul", _between_chunks(b, node, added), b.reshape(added, 0, 0, 0, D * E))
    before = b.reshape(flat, 0, 0, 0, D, E)
    reading = b.op("MatMul", b.op("Mul", q, _powers(b, node, at[:, None] + 1)), before)
    return from_chunks(b, b.op("Add", inside, reading), node["q"], width)


def _powers(b: Builder, node: XfNode, steps: np.ndarray) -> ir.Value:
    """Return ``gamma ** steps`` of each head, ``[H, 1, *steps.shape]``, zero where the steps are negative."""
    dtype = node["q"].dtype.numpy()
    exponents = b.op("Mul", _per_head(b, node, 3), b.constant(np.maximum(steps, 0), dtype))
    powers = b.op("Exp", exponents)
    return powers if (steps >= 0).all() else b.op("Mul", powers, b.constant(steps >= 0, dtype))


def _between_chunks(b: Builder, node: XfNode, added: ir.Value) -> ir.Value:
    """Return what the state before chunk n keeps of what chunk m added, ``gamma ** (CHUNK (n - 1 - m))``, [H, N, N]."""
    zero, one = b.constant(0, np.int64), b.constant(1, np.int64)
    at = b.op("Range", zero, b.op("Squeeze", b.op("Shape", added, start=2, end=3)), one)
    chunks = b.op("Sub", b.op("Sub", b.op("Unsqueeze", at, b.constant([1], np.int64)), one), at)
    steps = b.op("Cast", b.op("Mul", b.op("Max", chunks, zero), b.constant(CHUNK, np.int64)), to=int(node["q"].dtype))
    powers = b.op("Exp", b.op("Mul", _per_head(b, node, 2), steps))
    return b.op("Where", b.op("GreaterOrEqual", chunks, zero), powers, b.scalar(0.0, node["q"]))


def _per_head(b: Builder, node: XfNode, behind: int) -> ir.Value:
    """Return the log decays with axes of size one behind that of the heads."""
    return b.reshape(node["log_decay"], node["heads"], *[1] * behind)


FORMS = (Form("chunked", chunked, is_standard=True),)
