"""The ONNX form of ``xf.shift_linear``: runtimes have no product by shifts, so that it is computed in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_packing import codebook_weight
from xformopt.kernels.shift_linear.reference import power_table

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def table_and_product(b: Builder, node: XfNode) -> ir.Value:
    """The weights from a table of powers, then the product."""
    bits, top = node["bits"], node["top"]
    table = power_table(bits, top).float().numpy()
    weight = codebook_weight(b, node["weight"], table, bits=bits, width=node.size("x", -1))
    product = b.op("MatMul", node["x"], b.op("Transpose", weight, perm=[1, 0]))
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


FORMS = (Form("table_and_product", table_and_product, is_standard=True),)
