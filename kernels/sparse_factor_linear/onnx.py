"""The ONNX form of ``xf.sparse_factor_linear``: stored sparse, made dense when the model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_packing import unpacked

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_INT64 = 7


def scatter_and_products(b: Builder, node: XfNode) -> ir.Value:
    """The entries in their places, then two dense products."""
    outputs, entries = node.size("values", 0), node.size("values", 1)
    vectors = node.size("basis", 0)
    places = b.op("Cast", unpacked(b, node["places"], 1, node["bits"], entries), to=_INT64)
    # zeros in the file would undo what is saved there
    empty = b.op("ConstantOfShape", b.constant([outputs, vectors], np.int64))
    coefficients = b.op("ScatterElements", empty, places, node["values"], axis=1)
    features = b.op("MatMul", node["x"], b.transposed(node["basis"]))
    product = b.op("MatMul", features, b.op("Transpose", coefficients, perm=[1, 0]))
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


FORMS = (Form("scatter_and_products", scatter_and_products, is_standard=True),)
