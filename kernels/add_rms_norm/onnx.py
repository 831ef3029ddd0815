"""ONNX forms of ``xf.add_rms_norm``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.add_layer_norm.onnx import same_shapes
from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def apart(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value]:
    """The sum, then the norm; written ``Sum``, which ONNX Runtime does not fuse with the norm again."""
    total = b.op("Sum", node["x"], node["residual"])
    total.shape, total.type = node.outputs[1].shape, node.outputs[1].type
    return b.xf("rms_norm", total, node["weight"], like=total, eps=node["eps"]), total


def skip_simplified_layer_normalization(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value]:
    """ONNX Runtime's fused operator."""
    weight = node["weight"]
    if weight is None:
        weight = b.constant(np.ones(node.shape("x")[-1]), node["x"].dtype.numpy())
    normalized, _, _, total = b.ops(
        "SkipSimplifiedLayerNormalization",
        node["x"],
        node["residual"],
        weight,
        domain=CONTRIB,
        outputs=4,
        epsilon=node["eps"],
    )
    return normalized, total


FORMS = (
    Form("apart", apart, is_standard=True),
    Form("skip_simplified_layer_normalization", skip_simplified_layer_normalization, same_shapes),
)
