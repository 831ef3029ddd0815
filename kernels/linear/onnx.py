"""ONNX forms of ``xf.linear``; a constant weight is stored transposed, ``[I, O]``, as ONNX Runtime packs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def shared_weight_matmul(b: Builder, node: XfNode) -> ir.Value:
    """A product with the weight as it is, ``[O, I]``, so that a tied embedding is stored once."""
    return _biased(b, node, b.op("FusedMatMul", node["x"], node["weight"], domain=CONTRIB, transB=1))


def shared_weight_gemm(b: Builder, node: XfNode) -> ir.Value:
    """The same in the operators of the standard, over all positions as one matrix."""
    return _gemm(b, node, node["weight"], transB=1)


def matmul(b: Builder, node: XfNode) -> ir.Value:
    """MatMul, then Add: ONNX Runtime adds a bias faster on its own than within Gemm."""
    return _biased(b, node, b.op("MatMul", node["x"], b.transposed(node["weight"])))


def gemm(b: Builder, node: XfNode) -> ir.Value:
    """Gemm over all positions as one matrix."""
    return _gemm(b, node, b.transposed(node["weight"]))


def _biased(b: Builder, node: XfNode, product: ir.Value) -> ir.Value:
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _gemm(b: Builder, node: XfNode, weight: ir.Value, transB: int = 0) -> ir.Value:
    x, leading = node["x"], len(node.shape("x")) - 1
    rows, columns = node.size("weight", 0), node.size("weight", 1)
    flat = x if leading == 1 else b.reshape(x, -1, columns)
    product = b.op("Gemm", flat, weight, node["bias"], transB=transB)
    return product if leading == 1 else b.reshape(product, *(b.size(x, axis) for axis in range(leading)), rows)


def _is_flattened(node: XfNode) -> Verdict:
    known = len(node.shape("x")) > 1 and all(isinstance(size, int) for size in node.shape("weight"))
    return None if known else "it wants a matrix and a weight of known size"


def _has_shared_weight(node: XfNode) -> Verdict:
    readers = {use.node.op_type for use in node["weight"].uses()}
    return _is_flattened(node) if readers - {"linear", "linear_activation"} else "the weight has no other reader"


FORMS = (
    Form("shared_weight_matmul", shared_weight_matmul, _has_shared_weight),
    Form("shared_weight_gemm", shared_weight_gemm, _has_shared_weight, is_standard=True),
    Form("matmul", matmul, is_standard=True),
    Form("gemm", gemm, _is_flattened, is_standard=True),
)
