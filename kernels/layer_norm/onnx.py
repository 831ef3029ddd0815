"""ONNX forms of ``xf.layer_norm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS", "in_groups"]


def layer_normalization(b: Builder, node: XfNode) -> ir.Value:
    """The standard operator, over groups where there are several."""
    x, groups = node["x"], node["groups"]
    weight = node["weight"]
    if weight is None:
        weight = b.constant(np.ones(node.size("x", -1) // groups), x.dtype.numpy())

    def normalize(parts: ir.Value) -> ir.Value:
        return b.op("LayerNormalization", parts, weight, node["bias"], axis=-1, epsilon=node["eps"])

    return in_groups(b, node, normalize)


def in_groups(b: Builder, node: XfNode, normalize: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """Apply ``normalize`` over the last axis, split into the node's groups."""
    x, groups = node["x"], node["groups"]
    if groups == 1:
        return normalize(x)
    leading = [0] * (len(node.shape("x")) - 1)
    width = node.size("x", -1)
    parts = b.reshape(x, *leading, groups, width // groups)
    return b.reshape(normalize(parts), *leading, width)


FORMS = (Form("layer_normalization", layer_normalization, is_standard=True),)
