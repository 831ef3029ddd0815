"""ONNX forms of ``xf.match_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.match_tokens.reference import FORBIDDEN, FREE
from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import ascending, count, per_row, take_every_other

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_TINY = 1e-30


def reductions(b: Builder, node: XfNode) -> tuple[ir.Value, ...]:
    """The best partner by a maximum and its place."""
    similarity = _similarity(b, node)
    last = b.constant([-1], np.int64)
    return _indices(
        b, node, b.op("ReduceMax", similarity, last, keepdims=0), b.op("ArgMax", similarity, axis=-1, keepdims=0)
    )


def top(b: Builder, node: XfNode) -> tuple[ir.Value, ...]:
    """The best partner by TopK, which finds value and place at once."""
    best, partner = b.ops("TopK", _similarity(b, node), b.constant([1], np.int64), outputs=2, axis=-1)
    last = b.constant([-1], np.int64)
    return _indices(b, node, b.op("Squeeze", best, last), b.op("Squeeze", partner, last))


def _similarity(b: Builder, node: XfNode) -> ir.Value:
    """Return the cosine of every token of the first set and every one of the second."""
    keys, heads, prefix = node["keys"], node["heads"], node["prefix"]
    apart = b.reshape(keys, 0, 0, heads, node.size("keys", 2) // heads)
    metric = b.op("ReduceMean", apart, b.constant([2], np.int64), keepdims=0)
    norm = b.op("ReduceL2", metric, b.constant([2], np.int64), keepdims=1)
    metric = b.op("Div", metric, b.op("Max", norm, b.scalar(_TINY, keys)))
    first, second = (take_every_other(b, metric, prefix + start) for start in (0, 1))
    similarity = b.op("MatMul", first, b.op("Transpose", second, perm=[0, 2, 1]))
    if node["sizes"] is not None:
        zero = b.scalar(0.0, keys)
        for start, axis, value in ((1, 1, FORBIDDEN), (0, 2, FREE)):
            padded = b.op("Equal", take_every_other(b, node["sizes"], prefix + start), zero)
            padded = b.op("Unsqueeze", padded, b.constant([axis], np.int64))
            similarity = b.op("Where", padded, b.scalar(value, keys), similarity)
    return similarity


def _indices(b: Builder, node: XfNode, best: ir.Value, partner: ir.Value) -> tuple[ir.Value, ...]:
    prefix = node["prefix"]
    r = b.constant([node["r"]], np.int64)
    zero, two = (b.constant(value, np.int64) for value in (0, 2))
    first = b.constant([prefix], np.int64)
    behind = b.op("Sub", count(b, node, "keys"), first)
    in_second = b.op("Div", behind, b.constant([2], np.int64))
    in_first = b.op("Sub", behind, in_second)
    _, order = b.ops("TopK", best, in_first, outputs=2, axis=1)
    axis = b.constant([1], np.int64)
    merged = b.op("Slice", order, b.constant([0], np.int64), r, axis)
    rest = b.op("Slice", order, r, in_first, axis)
    other = b.op("Add", b.op("Mul", ascending(b, zero, in_second), two), b.constant(prefix + 1, np.int64))
    parts = [b.op("Add", b.op("Mul", rest, two), first), per_row(b, other, node["keys"])]
    if prefix:
        parts.insert(0, per_row(b, b.constant(np.arange(prefix), np.int64), node["keys"]))
    kept = b.op("Concat", *parts, axis=1)
    sources = b.op("Add", b.op("Mul", merged, two), first)
    offset = b.op("Add", b.op("Sub", in_first, r), first)
    return kept, sources, b.op("Add", b.op("GatherElements", partner, merged, axis=1), offset)


FORMS = (
    Form("reductions", reductions, is_standard=True),
    Form("top", top, is_standard=True),
)
