"""ONNX forms of ``xf.rwkv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import first_state, from_chunks, heads_in_chunks
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# the peak of a sum of nothing, by the bytes of a number: far below any exponent, and finite
_LOWEST = {2: -1.0e4, 4: -1.0e30, 8: -1.0e30}


class _Sum(NamedTuple):
    """Values and weights side by side ``[..., 2, C]``, both over ``exp(peak)``, the peak ``[..., 1, C]``."""

    both: ir.Value
    peak: ir.Value


def chunked(b: Builder, node: XfNode) -> ir.Value:
    """All chunks at once, by sums of 1, 2, 4, ... tokens; a Scan hands the sums from chunk to chunk."""
    if node["bidirectional"]:
        return _bidirectional(b, node)
    token, past = _tokens_and_past(b, node, node["k"], node["v"])
    now = _Sum(token.both, b.op("Add", token.peak, b.reshape(node["bonus"], 1, -1)))
    mean = _mean(b, _plus(b, past, now))
    return from_chunks(b, b.op("Transpose", mean, perm=[0, 3, 1, 2, 4]), node["k"], node.size("k", -1))


def _bidirectional(b: Builder, node: XfNode) -> ir.Value:
    """Both directions by chunks, then in the order of the tokens ``[B, T, ., C]``."""
    _, past = _tokens_and_past(b, node, node["k"], node["v"])
    reversed_ = [_backwards(b, node[name]) for name in ("k", "v")]
    for value in reversed_:
        value.shape, value.type = node["k"].shape, node["k"].type
    _, later = _tokens_and_past(b, node, reversed_[0], reversed_[1])
    ahead = _Sum(*(_backwards(b, x) for x in _in_order(b, node, later)))
    own = b.op("Unsqueeze", b.op("Add", node["k"], node["bonus"]), b.constant([2], np.int64))
    values = b.op("Unsqueeze", node["v"], b.constant([2], np.int64))
    now = _Sum(b.op("Concat", values, _ones(b, node, values), axis=2), own)
    mean = _mean(b, _plus(b, _plus(b, _in_order(b, node, past), ahead), now), axis=2)
    return b.op("Squeeze", mean, b.constant([2], np.int64))


def _in_order(b: Builder, node: XfNode, past: _Sum) -> _Sum:
    """Turn sums ``[B, n, L, ., C]`` into ``[B, T, ., C]``."""
    parts = []
    for value, rows in ((past.both, 2), (past.peak, 1)):
        flat = b.reshape(value, 0, -1, rows, node.size("k", -1))
        zero, axis = b.constant([0], np.int64), b.constant([1], np.int64)
        parts.append(b.op("Slice", flat, zero, b.size(node["k"], 1), axis))
    return _Sum(parts[0], parts[1])


def _backwards(b: Builder, value: ir.Value) -> ir.Value:
    """Reverse the tokens, axis 1."""
    last, end, one = b.constant([-1], np.int64), b.constant([-(1 << 62)], np.int64), b.constant([1], np.int64)
    return b.op("Slice", value, last, end, one, last)


def _ones(b: Builder, node: XfNode, like: ir.Value) -> ir.Value:
    return b.op("Add", b.op("Sub", like, like), b.scalar(1.0, node["k"]))


def _mean(b: Builder, total: _Sum, axis: int = 3) -> ir.Value:
    summed, weights = b.ops("Split", total.both, outputs=2, axis=axis, num_outputs=2)
    return b.op("Div", summed, weights)


def _tokens_and_past(b: Builder, node: XfNode, k: ir.Value, v: ir.Value) -> tuple[_Sum, _Sum]:
    """Return each token by itself and the sum over all before it, ``[B, n, L, ., C]``."""
    width, rate = node.size("k", -1), b.reshape(node["log_decay"], 1, -1)  # [1, C]
    # one head, whose axis then holds values and weights: [B, n, L, 1, C]
    keys, values = (b.op("Transpose", heads_in_chunks(b, x, 1, width), perm=[0, 2, 3, 1, 4]) for x in (k, v))
    token = _Sum(b.op("Concat", values, _ones(b, node, values), axis=3), keys)
    inside, reach = token, 1
    while reach < CHUNK:
        inside = _plus(b, inside, _aged(b, _later(b, node, inside, reach), reach, rate, node))
        reach *= 2
    older = _before_chunks(b, node, inside, rate, width)  # [B, n, 1, ., C]
    steps = b.constant(np.arange(CHUNK).reshape(-1, 1, 1), node["k"].dtype.numpy())
    faded = _Sum(older.both, b.op("Add", older.peak, b.op("Mul", steps, rate)))
    return token, _plus(b, faded, _later(b, node, inside, 1))


def _plus(b: Builder, one: _Sum, two: _Sum) -> _Sum:
    peak = b.op("Max", one.peak, two.peak)
    scaled = [b.op("Mul", b.op("Exp", b.op("Sub", x.peak, peak)), x.both) for x in (one, two)]
    return _Sum(b.op("Add", *scaled), peak)


def _aged(b: Builder, past: _Sum, tokens: int, rate: ir.Value, node: XfNode) -> _Sum:
    return _Sum(past.both, b.op("Add", past.peak, b.op("Mul", rate, b.scalar(float(tokens), node["k"]))))


def _later(b: Builder, node: XfNode, past: _Sum, tokens: int) -> _Sum:
    """Move sums ``[B, n, L, ., C]`` to a later token of their chunk; the first tokens get nothing."""
    shift = b.constant([0, 0, tokens, 0, 0, 0, 0, -tokens, 0, 0], np.int64)
    k = node["k"]
    lowest = b.scalar(_LOWEST[k.dtype.itemsize], k)
    return _Sum(b.op("Pad", past.both, shift, b.scalar(0.0, k)), b.op("Pad", past.peak, shift, lowest))


def _before_chunks(b: Builder, node: XfNode, inside: _Sum, rate: ir.Value, width: int) -> _Sum:
    """Return the sum over all tokens before each chunk, ``[B, n, 1, ., C]``."""
    k, last = node["k"], b.constant([CHUNK - 1], np.int64)
    items = [b.op("Gather", value, last, axis=2) for value in inside]  # [B, n, 1, ., C]
    both, peak = first_state(b, k, 1, 2, width), first_state(b, k, 1, 1, width)
    lowest = b.op("Add", peak, b.scalar(_LOWEST[k.dtype.itemsize], k))
    for value in (*items, lowest):
        value.type = k.type

    def step(
        inner: Builder, state: Sequence[ir.Value], item: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        past, chunk = _Sum(state[0], state[1]), _Sum(item[0], item[1])
        reached = _plus(inner, _aged(inner, past, CHUNK, rate, node), chunk)
        return list(reached), list(state)

    _, before = b.scan(step, [both, lowest], items, axis=1)
    return _Sum(before[0], before[1])


FORMS = (Form("chunked", chunked, is_standard=True),)
