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
    width, rate = node.size("k", -1), b.reshape(node["log_decay"], 1, -1)  # [1, C]
    # one head, whose axis then holds values and weights: [B, n, L, 1, C]
    keys, values = (
        b.op("Transpose", heads_in_chunks(b, node[name], 1, width), perm=[0, 2, 3, 1, 4]) for name in ("k", "v")
    )
    ones = b.op("Add", b.op("Sub", values, values), b.scalar(1.0, node["k"]))
    token = _Sum(b.op("Concat", values, ones, axis=3), keys)
    inside, reach = token, 1
    while reach < CHUNK:
        inside = _plus(b, inside, _aged(b, _later(b, node, inside, reach), reach, rate, node))
        reach *= 2
    older = _before_chunks(b, node, inside, rate, width)  # [B, n, 1, ., C]
    steps = b.constant(np.arange(CHUNK).reshape(-1, 1, 1), node["k"].dtype.numpy())
    faded = _Sum(older.both, b.op("Add", older.peak, b.op("Mul", steps, rate)))
    now = _Sum(token.both, b.op("Add", token.peak, b.reshape(node["bonus"], 1, -1)))
    total = _plus(b, _plus(b, faded, _later(b, node, inside, 1)), now).both
    summed, weights = b.ops("Split", total, outputs=2, axis=3, num_outputs=2)
    return from_chunks(b, b.op("Transpose", b.op("Div", summed, weights), perm=[0, 3, 1, 2, 4]), node["k"], width)


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
