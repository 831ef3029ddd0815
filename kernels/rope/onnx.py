"""ONNX forms of ``xf.rope``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def rotary_embedding(b: Builder, node: XfNode) -> ir.Value:
    """The standard operator; it wants the angles of every sequence."""
    x, half = node["x"], node.size("cos", -1)
    cos, sin = (_for_batch(b, node, node[name]) for name in ("cos", "sin"))
    is_whole = 2 * half * node["heads"] == node.shape("x")[-1]
    return b.op(
        "RotaryEmbedding",
        x,
        cos,
        sin,
        num_heads=node["heads"],
        interleaved=int(node["interleaved"]),
        rotary_embedding_dim=0 if is_whole else 2 * half,
    )


def _for_batch(b: Builder, node: XfNode, angles: ir.Value) -> ir.Value:
    if node.shape("cos")[0] == node.shape("x")[0]:
        return angles
    ones = b.constant([1, 1], np.int64)
    return b.op("Expand", angles, b.op("Concat", b.size(node["x"], 0), ones, axis=0))


def _takes_angles(node: XfNode) -> Verdict:
    cos, x = node.shape("cos"), node.shape("x")
    if not isinstance(cos[-1], int):
        return "the number of angles is dynamic"
    if cos[0] not in (1, x[0]):
        return "the angles' batch is neither 1 nor the tokens'"
    return None if cos[1] == x[1] else "there is not one angle for each token"


def formula(b: Builder, node: XfNode) -> ir.Value:
    """The definition: halves or pairs, turned."""
    x, heads = node["x"], node["heads"]
    width, half = node.size("x", -1), node.size("cos", -1)
    depth, axis = width // heads, b.constant([2], np.int64)
    cos, sin = (b.op("Unsqueeze", node[name], axis) for name in ("cos", "sin"))  # [B or 1, T, 1, R / 2]
    parts = b.reshape(x, 0, 0, heads, depth)
    rotated, kept = parts, None
    if 2 * half < depth:
        rotated, kept = _split(b, parts, 2 * half, depth - 2 * half)
    if node["interleaved"]:
        pairs = _split(b, b.reshape(rotated, 0, 0, heads, half, 2), 1, 1)
        first, second = (b.op("Squeeze", part, b.constant([-1], np.int64)) for part in pairs)
    else:
        first, second = _split(b, rotated, half, half)
    turned = (
        b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin)),
        b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin)),
    )
    if node["interleaved"]:
        columns = (b.op("Unsqueeze", part, b.constant([-1], np.int64)) for part in turned)
        whole = b.reshape(b.op("Concat", *columns, axis=-1), 0, 0, heads, 2 * half)
        whole = whole if kept is None else b.op("Concat", whole, kept, axis=-1)
    else:
        whole = b.op("Concat", *turned, *([] if kept is None else [kept]), axis=-1)
    return b.reshape(whole, 0, 0, width)


def _split(b: Builder, value: ir.Value, left: int, right: int) -> tuple[ir.Value, ir.Value]:
    first, second = b.ops("Split", value, b.constant([left, right], np.int64), outputs=2, axis=-1)
    return first, second


FORMS = (
    Form("rotary_embedding", rotary_embedding, _takes_angles, is_standard=True),
    Form("formula", formula, is_standard=True),
)
