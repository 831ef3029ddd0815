"""Feature maps of linear attention in ONNX: ``kernels/features.py`` for queries and keys whose heads are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["apart", "features", "features_of_tokens", "width_of", "without_absent"]


def apart(b: Builder, node: XfNode, x: ir.Value, depth: int) -> ir.Value:
    """Turn ``[B, T, heads * depth]`` into ``[B, heads, T, depth]``."""
    return b.op("Transpose", b.reshape(x, 0, 0, node["heads"], depth), perm=[0, 2, 1, 3])


def features(b: Builder, node: XfNode, x: ir.Value, feature: str) -> ir.Value:
    """Return the features of ``[B, heads, T, D]`` (of any shape where there is no projection)."""
    like, last = node["q"], b.constant([-1], np.int64)
    if feature == "given":
        return b.op("Identity", x)
    if feature == "elu":
        return b.op("Add", b.op("Elu", x), b.scalar(1.0, like))
    projected = b.op("MatMul", x, node["projection"])
    if feature == "hedgehog":
        return b.op(
            "Concat", b.op("Softmax", projected, axis=-1), b.op("Softmax", b.op("Neg", projected), axis=-1), axis=-1
        )
    half = b.op("Mul", b.op("ReduceSumSquare", x, last, keepdims=1), b.scalar(0.5, like))
    scale = node.size("projection", 2) ** -0.5
    return b.op("Mul", b.op("Exp", b.op("Sub", projected, half)), b.scalar(scale, like))


def width_of(node: XfNode, feature: str) -> int:
    """Return how many features a head has."""
    if node["projection"] is None:
        return node.size("q", -1) // int(node["heads"])
    return node.size("projection", 2) * (2 if feature == "hedgehog" else 1)


def features_of_tokens(b: Builder, node: XfNode, name: str) -> ir.Value:
    """Return the features of the queries or keys ``node[name]``, ``[B, T, heads * F]``."""
    import onnx_ir as ir

    x, feature, sizes = node[name], node["feature"], list(node[name].shape)
    if node["projection"] is None:
        mapped = features(b, node, x, feature)
    else:
        sizes[-1] = node["heads"] * width_of(node, feature)
        heads = apart(b, node, x, node.size(name, -1) // node["heads"])
        together = b.op("Transpose", features(b, node, heads, feature), perm=[0, 2, 1, 3])
        mapped = b.reshape(together, 0, 0, sizes[-1])
    mapped.shape, mapped.type = ir.Shape(sizes), x.type
    return mapped


def without_absent(b: Builder, x: ir.Value, key_mask: ir.Value, like: ir.Value) -> ir.Value:
    """Return ``[B, T, C]`` with zeros where a key does not exist."""
    exists = b.op("Unsqueeze", key_mask, b.constant([-1], np.int64))
    masked = b.op("Where", exists, x, b.scalar(0.0, like))
    masked.shape, masked.type = x.shape, x.type
    return masked
