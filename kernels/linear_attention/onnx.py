"""ONNX forms of ``xf.linear_attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks, product_with_transposed, running_sum
from xformopt.kernels.onnx_features import features_of_tokens, width_of, without_absent
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def states(b: Builder, node: XfNode) -> ir.Value:
    """By the state of all keys; where causal, chunkwise with a running sum of states over the chunks."""
    q, k = (features_of_tokens(b, node, name) for name in ("q", "k"))
    if node["key_mask"] is not None:
        k = without_absent(b, k, node["key_mask"], node["k"])
    return (_causal if node["causal"] else _bidirectional)(b, node, q, k)


def _bidirectional(b: Builder, node: XfNode, q: ir.Value, k: ir.Value) -> ir.Value:
    heads, width = node["heads"], node.size("v", -1)
    D, E = width_of(node, node["feature"]), width // heads
    queries = b.op("Transpose", b.reshape(q, 0, 0, heads, D), perm=[0, 2, 1, 3])  # [B, H, T, D]
    keys = b.op("Transpose", b.reshape(k, 0, 0, heads, D), perm=[0, 2, 3, 1])  # [B, H, D, S]
    values = b.op("Transpose", b.reshape(node["v"], 0, 0, heads, E), perm=[0, 2, 1, 3])  # [B, H, S, E]
    attended = b.op("MatMul", queries, b.op("MatMul", keys, values))
    if node["normalize"]:
        total = b.op("ReduceSum", keys, b.constant([-1], np.int64), keepdims=1)  # [B, H, D, 1]
        attended = _divided(b, node, attended, b.op("MatMul", queries, total))
    return b.reshape(b.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, 0, width)


def _causal(b: Builder, node: XfNode, q: ir.Value, k: ir.Value) -> ir.Value:
    heads, width = node["heads"], node.size("v", -1)
    D, E = width_of(node, node["feature"]), width // heads
    queries, keys = (heads_in_chunks(b, x, heads, D) for x in (q, k))
    values = heads_in_chunks(b, node["v"], heads, E)
    allowed = b.constant(np.tri(CHUNK), node["q"].dtype.numpy())
    weights = b.op("Mul", product_with_transposed(b, queries, keys), allowed)  # [B, H, N, C, C]
    columns = b.op("Transpose", keys, perm=[0, 1, 2, 4, 3])
    before = running_sum(b, b.op("MatMul", columns, values), 2, exclusive=True)  # [B, H, N, D, E]
    attended = b.op("Add", b.op("MatMul", weights, values), b.op("MatMul", queries, before))
    if node["normalize"]:
        last = b.constant([-1], np.int64)
        seen = running_sum(b, b.op("ReduceSum", columns, last, keepdims=1), 2, exclusive=True)  # [B, H, N, D, 1]
        inside = b.op("ReduceSum", weights, last, keepdims=1)
        attended = _divided(b, node, attended, b.op("Add", inside, b.op("MatMul", queries, seen)))
    return from_chunks(b, attended, node["q"], width)


def _divided(b: Builder, node: XfNode, attended: ir.Value, total: ir.Value) -> ir.Value:
    return b.op("Div", attended, b.op("Add", total, b.scalar(node["eps"], node["q"])))


FORMS = (Form("states", states, is_standard=True),)
