"""ONNX forms of ``xf.merge_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import ascending, gather_tokens, into

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_TINY = 1e-30


def gather_and_add(b: Builder, node: XfNode) -> tuple[ir.Value, ...]:
    """Tokens that stay are gathered; those merged away come by a product with their few columns of the assignment."""
    x, kept, sources = node["x"], node["kept"], node["sources"]
    moves = _one_hot(b, node, node["destinations"])  # [B, N, R]
    if node["sizes"] is None:
        stayed, moved = b.scalar(1.0, x), moves
    else:
        stayed = b.op("GatherElements", node["sizes"], kept, axis=1)
        away = b.op("GatherElements", node["sizes"], sources, axis=1)
        moved = b.op("Mul", moves, b.op("Unsqueeze", away, b.constant([1], np.int64)))
    total = b.op("Add", stayed, b.op("ReduceSum", moved, b.constant([2], np.int64), keepdims=0))
    share = b.op(
        "Div",
        b.op("Unsqueeze", stayed, b.constant([-1], np.int64)) if node["sizes"] else stayed,
        _column(b, node, total),
    )
    own = b.op("Mul", gather_tokens(b, x, kept), share)
    joined = b.op("MatMul", b.op("Div", moved, _column(b, node, total)), gather_tokens(b, x, sources))
    return b.op("Add", own, joined), total


def assignment(b: Builder, node: XfNode) -> tuple[ir.Value, ...]:
    """One product with the whole assignment matrix, ``[B, N, T]``."""
    x = node["x"]
    weights = _one_hot(b, node, into(b, node["kept"], node["sources"], node["destinations"]))
    if node["sizes"] is not None:
        weights = b.op("Mul", weights, b.op("Unsqueeze", node["sizes"], b.constant([1], np.int64)))
    total = b.op("ReduceSum", weights, b.constant([2], np.int64), keepdims=0)
    return b.op("MatMul", b.op("Div", weights, _column(b, node, total)), x), total


def _one_hot(b: Builder, node: XfNode, places: ir.Value) -> ir.Value:
    """Return 1 where a row is the place of a column, ``[B, N, columns]``."""
    x = node["x"]
    rows = ascending(b, b.constant(0, np.int64), b.size(node["kept"], 1))
    same = b.op(
        "Equal",
        b.op("Unsqueeze", rows, b.constant([0, 2], np.int64)),
        b.op("Unsqueeze", places, b.constant([1], np.int64)),
    )
    return b.op("Cast", same, to=int(x.dtype))


def _column(b: Builder, node: XfNode, total: ir.Value) -> ir.Value:
    positive = total if node["sizes"] is None else b.op("Max", total, b.scalar(_TINY, node["x"]))
    return b.op("Unsqueeze", positive, b.constant([2], np.int64))


FORMS = (
    Form("gather_and_add", gather_and_add, is_standard=True),
    Form("assignment", assignment, is_standard=True),
)
