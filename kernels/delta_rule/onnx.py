"""ONNX forms of ``xf.delta_rule``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import first_state, from_chunks, heads_in_chunks, product_with_transposed
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS", "scanned"]


def chunked(b: Builder, node: XfNode) -> ir.Value:
    """Chunkwise, from a state of zeros."""
    return scanned(b, node, None)[0]


def scanned(b: Builder, node: XfNode, state: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Return outputs and the last state; the transition of a chunk is a matrix, so a Scan hands states on."""
    heads, width = node["heads"], node.size("v", -1)
    D, E = node.size("q", -1) // heads, width // heads
    scaled = b.op("Mul", node["q"], b.scalar(node["scale"], node["q"]))
    q, k, v, beta = (
        heads_in_chunks(b, x, heads, d) for x, d in ((scaled, D), (node["k"], D), (node["v"], E), (node["beta"], 1))
    )
    weighted = b.op("Mul", beta, k)
    inverse = _inverse(b, product_with_transposed(b, weighted, k), node)
    keys = b.op("MatMul", inverse, weighted)
    values = b.op("MatMul", inverse, b.op("Mul", beta, v))
    inside = b.op("Mul", product_with_transposed(b, q, k), b.constant(np.tri(CHUNK), node["q"].dtype.numpy()))
    columns = b.op("Transpose", k, perm=[0, 1, 2, 4, 3])  # [B, H, N, D, C]
    items = [q, keys, values, inside, columns]
    for value in items:
        value.type = node["q"].type

    def step(
        inner: Builder, state: Sequence[ir.Value], item: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        written = inner.op("Sub", item[2], inner.op("MatMul", item[1], state[0]))
        output = inner.op("Add", inner.op("MatMul", item[0], state[0]), inner.op("MatMul", item[3], written))
        return [inner.op("Add", state[0], inner.op("MatMul", item[4], written))], [output]

    before = first_state(b, q, heads, D, E) if state is None else state
    (last,), (outputs,) = b.scan(step, [before], items, axis=2)
    return from_chunks(b, outputs, node["q"], width), last


def _inverse(b: Builder, products: ir.Value, node: XfNode) -> ir.Value:
    """Return ``(I + tril(products, -1))^-1`` for ``[B, H, N, C, C]``, by blocks of twice the size at each step.

    Where ``X`` inverts the diagonal blocks and ``L`` is what lies below them in blocks of twice the size, ``X - X L X``
    inverts those.  Its terms stay as small as the inverse, which a sum of powers of the matrix would not.
    """
    dtype = node["q"].dtype.numpy()
    at = np.arange(CHUNK)
    inverse: ir.Value | None = None
    size = 1
    while size < CHUNK:
        row, column = at[:, None] // size, at // size
        below = (row == column + 1) & (row % 2 == 1)
        lower = b.op("Mul", products, b.constant(below, dtype))
        if inverse is None:
            inverse = b.op("Sub", b.constant(np.eye(CHUNK), dtype), lower)
        else:
            inverse = b.op("Sub", inverse, b.op("MatMul", inverse, b.op("MatMul", lower, inverse)))
        size *= 2
    assert inverse is not None
    return inverse


FORMS = (Form("chunked", chunked, is_standard=True),)
