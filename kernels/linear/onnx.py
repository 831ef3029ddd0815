"""ONNX forms of ``xf.linear``; a constant weight is stored transposed, ``[I, O]``, as ONNX Runtime packs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def matmul(b: Builder, node: XfNode) -> ir.Value:
    """MatMul, then Add."""
    product = b.op("MatMul", node["x"], b.transposed(node["weight"]))
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def gemm(b: Builder, node: XfNode) -> ir.Value:
    """Gemm over all positions as one matrix."""
    x, (rows, columns) = node["x"], node.shape("weight")
    assert isinstance(rows, int) and isinstance(columns, int)
    leading = len(node.shape("x")) - 1
    flat = x if leading == 1 else b.reshape(x, -1, columns)
    product: ir.Value = b.op("Gemm", flat, b.transposed(node["weight"]), node["bias"])
    if leading == 1:
        return product
    return b.reshape(product, *(_size(b, node, axis) for axis in range(leading)), rows)


def _size(b: Builder, node: XfNode, axis: int) -> int | ir.Value:
    known = node.shape("x")[axis]
    return known if isinstance(known, int) else b.size(node["x"], axis)


def shared_weight(b: Builder, node: XfNode) -> ir.Value:
    """FusedMatMul on the weight as it is, ``[O, I]``, so that a tied embedding is stored once."""
    product = b.op("FusedMatMul", node["x"], node["weight"], domain=CONTRIB, transB=1)
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _has_shared_weight(node: XfNode) -> Verdict:
    readers = {use.node.op_type for use in node["weight"].uses()}
    return None if readers - {"linear", "linear_activation"} else "the weight has no other reader"


FORMS = (
    Form("matmul", matmul, is_standard=True),
    Form("gemm", gemm, is_standard=True),
    Form("shared_weight", shared_weight, _has_shared_weight),
)
