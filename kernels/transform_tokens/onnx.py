"""The ONNX form of ``xf.transform_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import count, gather_tokens

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_TINY = 1e-30
_END = np.iinfo(np.int64).max


def top(b: Builder, node: XfNode) -> tuple[ir.Value, ...]:
    """The definition, with the anchors and the least similarity that counts by TopK."""
    metric, prefix = node["metric"], node["prefix"]
    first = b.constant([prefix], np.int64)
    behind = b.op("Sub", count(b, node, "metric"), first)
    stay = b.op("Sub", behind, b.constant([node["r"]], np.int64))
    _, anchors = b.ops("TopK", _behind(b, node["scores"], prefix), stay, outputs=2, axis=1)
    norm = b.op("ReduceL2", metric, b.constant([2], np.int64), keepdims=1)
    unit = _behind(b, b.op("Div", metric, b.op("Max", norm, b.scalar(_TINY, metric))), prefix)
    chosen = gather_tokens(b, unit, anchors)
    similarity = b.op("MatMul", chosen, b.op("Transpose", unit, perm=[0, 2, 1]))
    some = b.op("Min", b.constant([node["neighbours"]], np.int64), stay)
    best, _ = b.ops("TopK", similarity, some, outputs=2, axis=1)
    least = b.op("ReduceMin", best, b.constant([1], np.int64), keepdims=1)
    taking_part = b.op("Cast", b.op("GreaterOrEqual", similarity, least), to=int(metric.dtype))
    heat = b.op("Sub", similarity, b.scalar(1.0, metric))
    weights = b.op("Mul", b.op("Exp", b.op("Div", heat, b.scalar(node["temperature"], metric))), taking_part)
    if node["sizes"] is not None:
        own = b.op("Unsqueeze", _behind(b, node["sizes"], prefix), b.constant([1], np.int64))
        weights = b.op("Mul", weights, own)
    mix = _normalized(b, node, weights, 2)
    share = _normalized(b, node, mix, 1)
    return _beside_prefix(b, node, mix, behind), _beside_prefix(b, node, share, behind)


def _behind(b: Builder, value: ir.Value, prefix: int) -> ir.Value:
    return b.op("Slice", value, *(b.constant([end], np.int64) for end in (prefix, _END, 1))) if prefix else value


def _normalized(b: Builder, node: XfNode, value: ir.Value, axis: int) -> ir.Value:
    total = b.op("ReduceSum", value, b.constant([axis], np.int64), keepdims=1)
    return b.op("Div", value, b.op("Max", total, b.scalar(_TINY, node["metric"])))


def _beside_prefix(b: Builder, node: XfNode, value: ir.Value, behind: ir.Value) -> ir.Value:
    """Put the rows and columns of the prefix in front, which stays alone."""
    prefix, metric = node["prefix"], node["metric"]
    if not prefix:
        return value
    zero = b.scalar(0.0, metric)
    alone = b.constant(np.eye(prefix)[None].astype(metric.dtype.numpy()))
    alone = b.op("Pad", alone, b.op("Concat", b.constant([0] * 5, np.int64), behind, axis=0), zero)
    rows = b.op("Expand", alone, b.op("Concat", b.size(metric, 0), b.constant([1, 1], np.int64), axis=0))
    return b.op("Concat", rows, b.op("Pad", value, b.constant([0, 0, prefix, 0, 0, 0], np.int64), zero), axis=1)


FORMS = (Form("top", top, is_standard=True),)
