"""The ONNX form of ``xf.ternary_linear``, computed in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_packing import codebook_weight
from xformopt.kernels.ternary_linear.reference import LEVELS

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def table_and_product(b: Builder, node: XfNode) -> ir.Value:
    """The weights from their levels and scale, then the product."""
    bits = node["bits"]
    levels = codebook_weight(b, node["weight"], np.array(LEVELS[bits]), bits=bits, width=node.size("x", -1))
    weight = b.op("Mul", levels, b.reshape(node["scale"], -1, 1))
    product = b.op("MatMul", node["x"], b.op("Transpose", weight, perm=[1, 0]))
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


FORMS = (Form("table_and_product", table_and_product, is_standard=True),)
