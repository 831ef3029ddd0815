"""ONNX forms of ``xf.local_attention``.

Tokens at a multiple of the dilation from each other are a sequence of their own, in which a window has no gaps; so are
the tokens of a stripe, which see each other.  The axis of these sequences is part of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.local_attention.operator import queries_together
from xformopt.kernels.onnx_form import Builder, Form, Verdict, XfNode
from xformopt.kernels.onnx_softmax import Weighted, bounded, distances, hide, mean_of, weighted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def gathered(b: Builder, node: XfNode) -> ir.Value:
    """Groups of adjacent queries with the keys around them; stripes apart, as sums that are added to the others'."""
    q = node["q"]
    logits, visible, values = _window(b, node)
    if node["stripe"]:
        flat = (
            _flat(b, node, x, size) for x, size in _sized(node, weighted(b, hide(b, logits, visible, q), values, q))
        )
        parts = (_in_order(b, node, Weighted(*flat), node["dilation"]), _stripes(b, node))
        attended = mean_of(b, q, *parts)
    else:
        attended = b.op("MatMul", b.op("Softmax", hide(b, logits, visible, q), axis=-1), values)
        if node["key_mask"] is not None:
            sees = b.op("ReduceMax", b.op("Cast", visible, to=int(q.dtype)), b.constant([-1], np.int64), keepdims=1)
            attended = b.op("Mul", attended, sees)
        attended = _tokens(b, node, _flat(b, node, attended, _depth(node)), node["dilation"], _depth(node))
    return b.reshape(attended, 0, 0, node.size("v", -1))


def attention(b: Builder, node: XfNode) -> ir.Value:
    """All pairs, by what attention with a window is fastest as: where there are few tokens."""
    return b.xf(
        "attention",
        node["q"],
        node["k"],
        node["v"],
        like=node["q"],
        width=node.size("v", -1),
        heads=node["heads"],
        kv_heads=node["heads"],
        scale=node["scale"],
        causal=int(node["causal"]),
        window_left=node["window_left"],
        window_right=-1 if node["causal"] else node["window_right"],
    )


def _is_plain(node: XfNode) -> Verdict:
    if node["dilation"] > 1 or node["stripe"]:
        return "attention knows neither dilation nor stripes"
    if node["bias"] is not None:
        return "with a bias, attention has a form for all pairs alone"
    return None if node["key_mask"] is None else "a query without any key must get zeros"


FORMS = (Form("gathered", gathered, is_standard=True), Form("attention", attention, _is_plain, is_standard=True))


def _window(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return logits ``[R, H, N, C, K]``, which of them count, and the values of their keys ``[R, H, N, K, E]``."""
    left, right, dilation = node["window_left"], node["window_right"], node["dilation"]
    C = queries_together(left, right)
    K = C + left + right
    q, k, v, exists = _sequences(b, node, dilation, C)
    # the first key of a group is as far before its first query as the window reaches
    zero, one = b.constant(0, np.int64), b.constant(1, np.int64)
    groups = b.op("Div", b.op("Shape", q, start=2, end=3), b.constant([C], np.int64))
    starts = b.op("Mul", b.op("Range", zero, b.op("Squeeze", groups), one), b.constant(C, np.int64))
    index = b.op(
        "Add", b.op("Unsqueeze", starts, b.constant([1], np.int64)), b.constant(np.arange(K), np.int64)
    )  # [N, K]
    keys, values = (b.op("Gather", _widened(b, x, left, right, 4), index, axis=2) for x in (k, v))
    present = b.op("Gather", _widened(b, exists, left, right, 3), index, axis=2)  # [R, 1, N, K]
    heads, depth = node["heads"], node.size("q", -1) // node["heads"]
    queries = b.reshape(q, 0, heads, -1, C, depth)
    logits = b.op("MatMul", queries, b.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))  # [R, H, N, C, K]
    if node["bias"] is not None:
        logits = b.op("Add", logits, _bias_of_windows(b, node, index, C))
    back = np.arange(C)[:, None] + left - np.arange(K)
    near = b.constant((back <= left) & (back >= -right))
    visible = b.op("And", b.op("Unsqueeze", b.op("Cast", present, to=_BOOL), b.constant([3], np.int64)), near)
    return logits, visible, values


def _bias_of_windows(b: Builder, node: XfNode, index: ir.Value, C: int) -> ir.Value:
    """Return the bias of each group of C queries for the keys ``index [N, K]`` around them, ``[., ., N, C, K]``."""
    left, right, q = node["window_left"], node["window_right"], node["q"]
    one = b.constant([1], np.int64)
    missing = b.op("Mod", b.op("Neg", b.size(q, 1)), b.constant([C], np.int64))
    after = b.op("Add", missing, b.constant([right], np.int64))
    pads = b.op("Concat", b.constant([0, 0, 0, left, 0, 0], np.int64), missing, after, axis=0)
    wide = b.op("Pad", bounded(b, node["bias"], q), pads)  # [., ., n, left + n + right]
    groups, width = b.op("Shape", index, start=0, end=1), b.op("Shape", wide, start=3, end=4)
    zero = b.constant(0, np.int64)
    every = b.op(
        "Range", zero, b.op("Squeeze", b.op("Mul", groups, b.constant([C], np.int64))), b.constant(1, np.int64)
    )
    rows = b.reshape(b.op("Mul", every, width), -1, C, 1)  # where each query's row begins
    places = b.op("Add", rows, b.op("Unsqueeze", index, one))  # [N, C, K]
    return b.op("Gather", b.reshape(wide, 0, 0, -1), places, axis=2)


def _stripes(b: Builder, node: XfNode) -> Weighted:
    """Each stripe with itself, without what a window has seen."""
    left, right, dilation, stripe = node["window_left"], node["window_right"], node["dilation"], node["stripe"]
    q, k, v, exists = _sequences(b, node, stripe, 1)
    logits = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))  # [R, H, n, n]
    zero = b.constant(0, np.int64)
    steps = distances(b, b.op("Shape", q, start=2, end=3))
    back = b.op("Mul", steps, b.constant(stripe, np.int64))
    fresh = [
        b.op("Greater", back, b.constant(left * dilation, np.int64)),
        b.op("Less", back, b.constant(-right * dilation, np.int64)),
    ]
    if dilation > 1:
        aside = b.op("Mod", back, b.constant(dilation, np.int64))
        fresh.append(b.op("Not", b.op("Equal", aside, zero)))
    allowed = fresh[0]
    for further in fresh[1:]:
        allowed = b.op("Or", allowed, further)
    if node["causal"]:
        allowed = b.op("And", allowed, b.op("GreaterOrEqual", back, zero))
    present = b.op("Unsqueeze", b.op("Cast", exists, to=_BOOL), b.constant([2], np.int64))  # [R, 1, 1, n]
    part = weighted(b, hide(b, logits, b.op("And", present, allowed), node["q"]), v, node["q"])
    return _in_order(b, node, part, stripe)


_BOOL, _UINT8 = 9, 2  # TensorProto.BOOL, TensorProto.UINT8


def _depth(node: XfNode) -> int:
    return node.size("v", -1) // int(node["heads"])


def _sequences(b: Builder, node: XfNode, apart: int, multiple: int) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Return queries, keys, values ``[B * apart, H, n, .]`` and which tokens exist ``[B * apart, 1, n]``, as bytes.

    A sequence holds every ``apart``-th token; its length n is a ``multiple``, filled up with tokens that do not exist.
    """
    heads, q = node["heads"], node["q"]
    scaled = b.op("Mul", q, b.scalar(node["scale"], q))
    missing = b.op("Mod", b.op("Neg", b.size(q, 1)), b.constant([apart * multiple], np.int64))
    before = b.constant([0, 0, 0, 0], np.int64)
    pads = b.op("Concat", before, missing, b.constant([0], np.int64), axis=0)
    tokens = []
    for x, name in ((scaled, "q"), (node["k"], "k"), (node["v"], "v")):
        depth = node.size(name, -1) // heads
        cut = b.reshape(b.op("Pad", x, pads), 0, -1, apart, heads, depth)
        tokens.append(
            b.reshape(
                b.op("Transpose", cut, perm=[0, 2, 3, 1, 4]), -1, heads, b.op("Shape", cut, start=1, end=2), depth
            )
        )
    if node["key_mask"] is None:
        exists = b.op("Expand", b.constant(1, np.uint8), b.op("Shape", q, start=0, end=2))
    else:
        exists = b.op("Cast", node["key_mask"], to=_UINT8)
    filled = b.op("Pad", exists, b.op("Concat", b.constant([0, 0, 0], np.int64), missing, axis=0))
    cut = b.reshape(filled, 0, -1, apart)
    present = b.reshape(b.op("Transpose", cut, perm=[0, 2, 1]), -1, 1, b.op("Shape", cut, start=1, end=2))
    return tokens[0], tokens[1], tokens[2], present


def _widened(b: Builder, x: ir.Value, left: int, right: int, axes: int) -> ir.Value:
    """Add tokens that do not exist before and after axis 2."""
    before, after = [0] * axes, [0] * axes
    before[2], after[2] = left, right
    return b.op("Pad", x, b.constant([*before, *after], np.int64))


def _flat(b: Builder, node: XfNode, x: ir.Value, size: int) -> ir.Value:
    """Turn ``[R, H, N, C, size]`` into ``[R, H, n, size]``."""
    return b.reshape(x, 0, node["heads"], -1, size)


def _sized(node: XfNode, part: Weighted) -> list[tuple[ir.Value, int]]:
    return list(zip(part, (_depth(node), 1, 1), strict=True))


def _in_order(b: Builder, node: XfNode, part: Weighted, apart: int) -> Weighted:
    """Turn sums ``[B * apart, H, n, .]`` into ``[B, T, H, .]``."""
    return Weighted(*(_tokens(b, node, x, apart, size) for x, size in _sized(node, part)))


def _tokens(b: Builder, node: XfNode, x: ir.Value, apart: int, size: int) -> ir.Value:
    """Turn ``[B * apart, H, n, size]`` into ``[B, T, H, size]``."""
    q, heads = node["q"], node["heads"]
    cut = b.reshape(x, b.size(q, 0), apart, heads, -1, size)
    tokens = b.reshape(b.op("Transpose", cut, perm=[0, 3, 1, 2, 4]), 0, -1, heads, size)
    return b.op("Slice", tokens, b.constant([0], np.int64), b.size(q, 1), b.constant([1], np.int64))
