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
    width = node.shape("x")[-1]
    assert isinstance(width, int)
    weight = node["weight"]
    if weight is None:
        weight = b.constant(np.ones(width // groups, x.dtype.numpy()))

    def normalize(parts: ir.Value) -> ir.Value:
        value: ir.Value = b.op("LayerNormalization", parts, weight, node["bias"], axis=-1, epsilon=node["eps"])
        return value

    return in_groups(b, node, normalize)


def in_groups(b: Builder, node: XfNode, normalize: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """Apply ``normalize`` over the last axis, split into the node's groups."""
    x, groups, shape = node["x"], node["groups"], node.shape("x")
    if groups == 1:
        return normalize(x)
    leading = [0] * (len(shape) - 1)
    width = shape[-1]
    assert isinstance(width, int)
    parts = b.reshape(x, *leading, groups, width // groups)
    return b.reshape(normalize(parts), *leading, width)


FORMS = (Form("layer_normalization", layer_normalization, is_standard=True),)
