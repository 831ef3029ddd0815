"""ONNX forms of ``xf.gated_linear_attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks, states
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def chunked(b: Builder, node: XfNode) -> ir.Value:
    """Chunkwise, each chunk by halves; a Scan hands the states from chunk to chunk."""
    heads, width = node["heads"], node.size("v", -1)
    D, E = node.size("q", -1) // heads, width // heads
    scaled = b.op("Mul", node["q"], b.scalar(node["scale"], node["q"]))
    q, k, gate = (heads_in_chunks(b, x, heads, D) for x in (scaled, node["k"], node["log_gate"]))
    v = heads_in_chunks(b, node["v"], heads, E)
    # batch, heads and chunks as one axis: [B * H * N, C, .]
    flat = [b.reshape(x, -1, CHUNK, d) for x, d in ((q, D), (k, D), (v, E), (gate, D))]
    within = _within(b, flat[0], flat[1], flat[2], flat[3], CHUNK, (D, E))
    out, since_start, to_end = (_like(b, part, q, d) for part, d in zip(within, (E, D, D), strict=True))
    decayed = b.op("Mul", k, b.op("Exp", to_end))
    added = b.op("MatMul", b.op("Transpose", decayed, perm=[0, 1, 2, 4, 3]), v)
    total = b.op("Gather", since_start, b.constant(CHUNK - 1, np.int64), axis=3)  # [B, H, N, D]
    left = b.op("Unsqueeze", b.op("Exp", total), b.constant([-1], np.int64))
    added.type = left.type = node["q"].type
    reading = b.op("MatMul", b.op("Mul", q, b.op("Exp", since_start)), states(b, added, left, heads, D, E))
    return from_chunks(b, b.op("Add", out, reading), node["q"], width)


class _Within(NamedTuple):
    """As in the reference, every value ``[M, C, .]``."""

    out: ir.Value
    since_start: ir.Value
    to_end: ir.Value


def _within(
    b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, gate: ir.Value, C: int, widths: tuple[int, int]
) -> _Within:
    """Halve the blocks, all of them at once; see the reference."""
    D, E = widths
    if C == 1:
        products = b.op("ReduceSum", b.op("Mul", q, k), b.constant([-1], np.int64), keepdims=1)
        return _Within(b.op("Mul", products, v), gate, b.op("Sub", gate, gate))
    half = C // 2
    halved = [b.reshape(x, -1, half, d) for x, d in ((q, D), (k, D), (v, E), (gate, D))]
    inner = _within(b, halved[0], halved[1], halved[2], halved[3], half, widths)
    out, since_start, to_end = (_halves(b, x, half, d) for x, d in zip(inner, (E, D, D), strict=True))
    (_, second_q), (first_k, _), (first_v, _) = (
        _halves(b, x, half, d) for x, d in ((halved[0], D), (halved[1], D), (halved[2], E))
    )
    queries = b.op("Mul", second_q, b.op("Exp", since_start[1]))
    keys = b.op("Mul", first_k, b.op("Exp", to_end[0]))
    weights = b.op("MatMul", queries, b.op("Transpose", keys, perm=[0, 2, 1]))
    cross = b.op("MatMul", weights, first_v)
    last = b.constant([half - 1], np.int64)
    first_total, second_total = (b.op("Gather", x, last, axis=1) for x in since_start)
    return _Within(
        b.op("Concat", out[0], b.op("Add", out[1], cross), axis=1),
        b.op("Concat", since_start[0], b.op("Add", since_start[1], first_total), axis=1),
        b.op("Concat", b.op("Add", to_end[0], second_total), to_end[1], axis=1),
    )


def _halves(b: Builder, value: ir.Value, half: int, width: int) -> tuple[ir.Value, ir.Value]:
    """Split pairs of blocks ``[2 M, half, width]`` into first and second halves ``[M, half, width]``."""
    first, second = b.ops("Split", b.reshape(value, -1, 2 * half, width), outputs=2, axis=1, num_outputs=2)
    return first, second


def _like(b: Builder, value: ir.Value, like: ir.Value, width: int) -> ir.Value:
    """Give ``[B * H * N, C, width]`` the leading axes of ``like [B, H, N, C, D]`` back."""
    return b.op("Reshape", value, b.op("Concat", b.op("Shape", like, end=4), b.constant([width], np.int64), axis=0))


FORMS = (Form("chunked", chunked, is_standard=True),)
