"""ONNX forms of ``xf.ssd``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks, product_with_transposed, running_sum, states
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def states_read(b: Builder, node: XfNode) -> ir.Value:
    """By chunks, or by the one state of all tokens where not causal; and what goes past."""
    out = _chunked(b, node) if node["causal"] else _global(b, node)
    if node["d"] is None:
        return out
    heads, width = node["heads"], node.size("x", -1)
    each = b.op("Mul", b.reshape(node["x"], 0, 0, heads, width // heads), b.reshape(node["d"], heads, 1))
    return b.op("Add", out, b.reshape(each, 0, 0, width))


def _chunked(b: Builder, node: XfNode) -> ir.Value:
    """Chunkwise, b and c multiplied once for each group; a Scan hands the states from chunk to chunk."""
    heads, groups, width = node["heads"], node["groups"], node.size("x", -1)
    P, N = width // heads, node.size("b", -1) // groups
    x, dt = heads_in_chunks(b, node["x"], heads, P), heads_in_chunks(b, node["dt"], heads, 1)
    write, read = (heads_in_chunks(b, node[name], groups, N) for name in ("b", "c"))
    inputs = b.op("Mul", x, dt)
    step = b.op("Mul", dt, b.reshape(node["a"], heads, 1, 1, 1))  # [B, H, n, C, 1]
    decay, to_end = _decays(b, node, step)
    products = _for_heads(b, node, product_with_transposed(b, read, write))
    inside = b.op("MatMul", b.op("Mul", products, decay), inputs)
    columns = _for_heads(b, node, b.op("Transpose", write, perm=[0, 1, 2, 4, 3]))
    added = b.op("MatMul", columns, b.op("Mul", inputs, to_end))  # [B, H, n, N, P]
    since_start = b.op("Exp", running_sum(b, step, 3))
    left = b.op("Gather", since_start, b.constant([CHUNK - 1], np.int64), axis=3)  # [B, H, n, 1, 1]
    added.type = left.type = x.type
    before = states(b, added, left, heads, N, P)
    reading = b.op("MatMul", _for_heads(b, node, read), before)
    return from_chunks(b, b.op("Add", inside, b.op("Mul", reading, since_start)), node["x"], width)


def _global(b: Builder, node: XfNode) -> ir.Value:
    """One state for all tokens, each weighed by its step and its head's rate."""
    heads, groups, width = node["heads"], node["groups"], node.size("x", -1)
    P, N = width // heads, node.size("b", -1) // groups
    weights = b.op("Abs", b.op("Mul", node["dt"], node["a"]))  # [B, T, H]
    weighed = b.op("Mul", b.reshape(node["x"], 0, 0, heads, P), b.op("Unsqueeze", weights, b.constant([-1], np.int64)))
    inputs = b.op("Transpose", weighed, perm=[0, 2, 1, 3])  # [B, H, T, P]
    write = b.op("Transpose", b.reshape(node["b"], 0, 0, groups, N), perm=[0, 2, 3, 1])  # [B, G, N, T]
    read = b.op("Transpose", b.reshape(node["c"], 0, 0, groups, N), perm=[0, 2, 1, 3])
    state = b.op("MatMul", _for_heads(b, node, write), inputs)  # [B, H, N, P]
    out = b.op("MatMul", _for_heads(b, node, read), state)
    return b.reshape(b.op("Transpose", out, perm=[0, 2, 1, 3]), 0, 0, width)


def _decays(b: Builder, node: XfNode, step: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the decay between each pair of a chunk ``[B, H, n, C, C]``, and from each token to the end ``[.., C, 1]``.

    Sums run over the tokens between the two of a pair, as in the reference: differences of sums would lose digits.
    """
    dtype = node["x"].dtype.numpy()
    sums = running_sum(b, b.op("Mul", step, b.constant(np.tri(CHUNK, k=-1), dtype)), 3)
    decay = b.op("Mul", b.op("Exp", sums), b.constant(np.tri(CHUNK), dtype))
    last = b.op("Gather", decay, b.constant(CHUNK - 1, np.int64), axis=3)  # [B, H, n, C]
    return decay, b.op("Unsqueeze", last, b.constant([-1], np.int64))


def _for_heads(b: Builder, node: XfNode, value: ir.Value) -> ir.Value:
    """Repeat ``[B, groups, ...]`` for the heads of each group; one group is broadcast."""
    heads, groups = node["heads"], node["groups"]
    if groups in (1, heads):
        return value
    return b.op("Gather", value, b.constant(np.arange(heads) // (heads // groups), np.int64), axis=1)


FORMS = (Form("chunked", states_read, is_standard=True),)
