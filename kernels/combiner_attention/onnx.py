"""The ONNX form of ``xf.combiner_attention``: blocks are an axis, and all products are batched ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import distances, hide

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# below every entry of a query or key
_LEAST = -3e4
_BOOL, _UINT8 = 9, 2  # TensorProto.BOOL, TensorProto.UINT8


def blocks(b: Builder, node: XfNode) -> ir.Value:
    """All blocks at once, with what stands for each."""
    heads, block, q = node["heads"], node["block"], node["q"]
    last, dtype = b.constant([-1], np.int64), int(q.dtype)
    missing = b.op("Mod", b.op("Neg", b.size(q, 1)), b.constant([block], np.int64))
    exists = _exists(b, node, missing)  # [B, 1, N, b]
    scaled = b.op("Mul", q, b.scalar(node["scale"], q))
    queries, keys, values = (
        _in_blocks(b, x, missing, heads, block, node.size(name, -1) // heads)
        for x, name in ((scaled, "q"), (node["k"], "k"), (node["v"], "v"))
    )
    filled = b.op("ReduceMax", b.op("Cast", exists, to=dtype), last, keepdims=1)  # [B, 1, N, 1]
    query, key = (_largest(b, x, exists, filled, q) for x in (queries, keys))  # [B, H, N, D]
    inside = b.op("Squeeze", b.op("MatMul", keys, b.op("Unsqueeze", query, last)), last)  # [B, H, N, b]
    share = b.op("Mul", b.op("Softmax", hide(b, inside, exists, q), axis=-1), filled)
    value = b.op("Squeeze", b.op("MatMul", _row(b, share, 3), values), b.constant([3], np.int64))  # [B, H, N, E]
    near = b.op("MatMul", queries, b.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))  # [B, H, N, b, b]
    far = b.op("MatMul", queries, _row(b, b.op("Transpose", key, perm=[0, 1, 3, 2]), 2))  # [B, H, N, b, N]
    visible = [_row(b, exists, 3), _others(b, node, filled)]  # [B, 1, N, 1, b], [B, 1, N, 1, N]
    if node["causal"]:
        earlier = b.constant(np.tri(block, dtype=bool))
        visible[0] = b.op("And", visible[0], earlier)
    both = b.op("Concat", hide(b, near, visible[0], q), hide(b, far, visible[1], q), axis=-1)
    weights = b.op("Softmax", both, axis=-1)
    begin, cut, end = (b.constant([place], np.int64) for place in (0, block, 1 << 40))
    on_keys = b.op("Slice", weights, begin, cut, last)
    on_blocks = b.op("Slice", weights, cut, end, last)
    attended = b.op("Add", b.op("MatMul", on_keys, values), b.op("MatMul", on_blocks, _row(b, value, 2)))
    if node["key_mask"] is not None:
        sees = [b.op("ReduceMax", b.op("Cast", part, to=dtype), last, keepdims=1) for part in visible]
        attended = b.op("Mul", attended, b.op("Max", *sees))
    tokens = b.reshape(b.op("Transpose", attended, perm=[0, 2, 3, 1, 4]), 0, -1, node.size("v", -1))
    return b.op("Slice", tokens, begin, b.size(q, 1), b.constant([1], np.int64))


FORMS = (Form("blocks", blocks, is_standard=True),)


def _exists(b: Builder, node: XfNode, missing: ir.Value) -> ir.Value:
    if node["key_mask"] is None:
        known = b.op("Expand", b.constant(1, np.uint8), b.op("Shape", node["q"], start=0, end=2))
    else:
        known = b.op("Cast", node["key_mask"], to=_UINT8)
    padded = b.op("Pad", known, b.op("Concat", b.constant([0, 0, 0], np.int64), missing, axis=0))
    return b.op("Cast", b.reshape(padded, 0, 1, -1, node["block"]), to=_BOOL)


def _in_blocks(b: Builder, x: ir.Value, missing: ir.Value, heads: int, block: int, depth: int) -> ir.Value:
    """Turn ``[B, T, H * depth]`` into ``[B, H, N, b, depth]``."""
    pads = b.op("Concat", b.constant([0, 0, 0, 0], np.int64), missing, b.constant([0], np.int64), axis=0)
    cut = b.reshape(b.op("Pad", x, pads), 0, -1, block, heads, depth)
    return b.op("Transpose", cut, perm=[0, 3, 1, 2, 4])


def _largest(b: Builder, x: ir.Value, exists: ir.Value, filled: ir.Value, like: ir.Value) -> ir.Value:
    """Return the largest entries over the tokens of each block that exist, zeros where none does."""
    known = b.op("Where", b.op("Unsqueeze", exists, b.constant([4], np.int64)), x, b.scalar(_LEAST, like))
    return b.op("Mul", b.op("ReduceMax", known, b.constant([3], np.int64), keepdims=0), filled)


def _others(b: Builder, node: XfNode, filled: ir.Value) -> ir.Value:
    """Return which blocks as wholes a query of each block sees, ``[B, 1, N, 1, N]``."""
    steps = distances(b, b.op("Shape", filled, start=2, end=3))  # [N, N]
    zero = b.constant(0, np.int64)
    apart = b.op("Greater", steps, zero) if node["causal"] else b.op("Not", b.op("Equal", steps, zero))
    has = b.op("Cast", b.op("Transpose", filled, perm=[0, 1, 3, 2]), to=_BOOL)  # [B, 1, 1, N]
    return _row(b, b.op("And", apart, has), 3)


def _row(b: Builder, x: ir.Value, axis: int) -> ir.Value:
    return b.op("Unsqueeze", x, b.constant([axis], np.int64))
