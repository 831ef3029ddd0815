"""ONNX forms of ``xf.add_layer_norm``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS", "same_shapes"]


def apart(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value]:
    """The sum, then the norm; written ``Sum``, which ONNX Runtime does not fuse with the norm again."""
    total = b.op("Sum", node["x"], node["residual"])
    total.shape, total.type = node.outputs[1].shape, node.outputs[1].type
    return b.xf("layer_norm", total, node["weight"], node["bias"], like=total, eps=node["eps"]), total


def skip_layer_normalization(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value]:
    """ONNX Runtime's fused operator."""
    width = node.shape("x")[-1]
    weight = node["weight"]
    if weight is None:
        weight = b.constant(np.ones(width), node["x"].dtype.numpy())
    normalized, _, _, total = b.ops(
        "SkipLayerNormalization",
        node["x"],
        node["residual"],
        weight,
        node["bias"],
        domain=CONTRIB,
        outputs=4,
        epsilon=node["eps"],
    )
    return normalized, total


def same_shapes(node: XfNode) -> Verdict:
    """Accept three axes and no broadcasting."""
    if node.shape("x") != node.shape("residual"):
        return "it does not broadcast the residual"
    return None if len(node.shape("x")) == 3 else "it takes three axes"


FORMS = (
    Form("apart", apart, is_standard=True),
    Form("skip_layer_normalization", skip_layer_normalization, same_shapes),
)
