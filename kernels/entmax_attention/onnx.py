"""ONNX forms of ``xf.entmax_attention``.

Nothing is skipped: which weights are zero is known only from the scores, and a graph has no tiles to leave out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.entmax_attention.reference import steps
from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import distances

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# below every threshold, of scores whose largest is 0
_NEVER = -2.0


def bracketed(b: Builder, node: XfNode) -> ir.Value:
    """Two products, and between them the steps to the thresholds of all rows at once."""
    heads, q, width = node["heads"], node["q"], node.size("v", -1)
    D, E = node.size("q", -1) // heads, width // heads
    alpha = node["alpha"]
    scaled = b.op("Mul", q, b.scalar(node["scale"] * (alpha - 1), q))
    queries = b.op("Transpose", b.reshape(scaled, 0, 0, heads, D), perm=[0, 2, 1, 3])  # [B, H, T, D]
    keys = b.op("Transpose", b.reshape(node["k"], 0, 0, heads, D), perm=[0, 2, 3, 1])  # [B, H, D, S]
    values = b.op("Transpose", b.reshape(node["v"], 0, 0, heads, E), perm=[0, 2, 1, 3])  # [B, H, S, E]
    scores = _below_peak(b, node, b.op("MatMul", queries, keys))
    weights = _weights(b, node, scores, _threshold(b, node, scores))
    total = b.op("ReduceSum", weights, b.constant([-1], np.int64), keepdims=1)
    tiny = b.scalar(float(np.finfo(q.dtype.numpy()).tiny), q)
    attended = b.op("Div", b.op("MatMul", weights, values), b.op("Max", total, tiny))
    return b.reshape(b.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, 0, width)


FORMS = (Form("bracketed", bracketed, is_standard=True),)


def _below_peak(b: Builder, node: XfNode, scores: ir.Value) -> ir.Value:
    """Return scores less the largest of their row that is visible; those that are not are below every threshold."""
    q, visible = node["q"], _visible(b, node)
    last, never = b.constant([-1], np.int64), b.scalar(_NEVER, q)
    if visible is None:
        return b.op("Sub", scores, b.op("ReduceMax", scores, last, keepdims=1))
    lowest = b.scalar(float(np.finfo(q.dtype.numpy()).min) / 4, q)
    peak = b.op("ReduceMax", b.op("Where", visible, scores, lowest), last, keepdims=1)
    return b.op("Where", visible, b.op("Sub", scores, peak), never)


def _visible(b: Builder, node: XfNode) -> ir.Value | None:
    """Return which key each query sees, ``[1 or B, 1, 1 or T, S]``, or None for all."""
    keys = None
    if node["key_mask"] is not None:
        keys = b.op("Unsqueeze", node["key_mask"], b.constant([1, 2], np.int64))
    if not node["causal"]:
        return keys
    earlier = b.op("GreaterOrEqual", distances(b, b.size(node["q"], 1)), b.constant(0, np.int64))
    return earlier if keys is None else b.op("And", keys, earlier)


def _threshold(b: Builder, node: XfNode, scores: ir.Value) -> ir.Value:
    """Return the threshold of each row, ``[B, H, T, 1]``."""
    q, power = node["q"], 1 / (node["alpha"] - 1)
    first = b.op("ReduceMax", scores, b.constant([-1], np.int64), keepdims=1)
    nothing = b.op("Sub", first, first)
    low = b.op("Sub", nothing, b.scalar(1.0, q))
    count = b.op("Cast", b.size(node["k"], 1), to=int(q.dtype))
    high = b.op("Sub", nothing, b.op("Pow", count, b.scalar(1 - node["alpha"], q)))
    t = low
    for _ in range(steps(node["alpha"])):
        f, df, ddf = _derivatives(b, node, scores, t, power)
        is_short = b.op("Greater", f, b.scalar(0.0, q))
        low, high = b.op("Where", is_short, t, low), b.op("Where", is_short, high, t)
        twice = b.op("Mul", f, b.scalar(2.0, q))
        below = b.op("Mul", b.op("Mul", df, df), b.scalar(2.0, q))
        if ddf is not None:
            below = b.op("Sub", below, b.op("Mul", f, ddf))
        # the first derivative is negative, and its sign was left out
        step = b.op("Add", t, b.op("Div", b.op("Mul", twice, df), below))
        is_inside = b.op("And", b.op("GreaterOrEqual", step, low), b.op("LessOrEqual", step, high))
        middle = b.op("Mul", b.op("Add", low, high), b.scalar(0.5, q))
        t = b.op("Where", is_inside, step, middle)
    return t


def _derivatives(
    b: Builder, node: XfNode, scores: ir.Value, t: ir.Value, power: float
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Return the sum of weights less one, minus its derivative, and the second one (None: zero)."""
    q, last = node["q"], b.constant([-1], np.int64)
    above = b.op("Relu", b.op("Sub", scores, t))
    is_above = b.op("Sign", above)
    if power == 1:
        total, slope = (b.op("ReduceSum", x, last, keepdims=1) for x in (above, is_above))
        return b.op("Sub", total, b.scalar(1.0, q)), slope, None
    if power == 2:
        squares = b.op("ReduceSumSquare", above, last, keepdims=1)
        slope, bend = (b.op("ReduceSum", x, last, keepdims=1) for x in (above, is_above))
    else:
        safe = b.op("Add", above, b.op("Sub", b.scalar(1.0, q), is_above))
        second = b.op("Mul", b.op("Pow", safe, b.scalar(power - 2, q)), is_above)
        first = b.op("Mul", second, above)
        sums = (b.op("Mul", first, above), first, second)
        squares, slope, bend = (b.op("ReduceSum", x, last, keepdims=1) for x in sums)
    minus = b.op("Mul", slope, b.scalar(power, q))
    return b.op("Sub", squares, b.scalar(1.0, q)), minus, b.op("Mul", bend, b.scalar(power * (power - 1), q))


def _weights(b: Builder, node: XfNode, scores: ir.Value, t: ir.Value) -> ir.Value:
    above, power = b.op("Relu", b.op("Sub", scores, t)), 1 / (node["alpha"] - 1)
    if power == 1:
        return above
    return b.op("Mul", above, above) if power == 2 else b.op("Pow", above, b.scalar(power, node["q"]))
