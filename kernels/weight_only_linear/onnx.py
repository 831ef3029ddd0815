"""ONNX forms of ``xf.weight_only_linear``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode
from xformopt.kernels.onnx_packing import dequantize_groups

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# MatMulNBits takes codes of so many bits in blocks of these sizes, and multiplies in float32 at this level
_BITS = (4, 8)
_BLOCKS = (16, 32, 64, 128, 256)
_FLOAT_ARITHMETIC = 1


def matmul_n_bits(b: Builder, node: XfNode) -> ir.Value:
    """ONNX Runtime's product with packed weights, multiplied in float32."""
    width = _width(node)
    product = b.op(
        "MatMulNBits",
        node["x"],
        node["weight"],
        node["scale"],
        node["zero"],
        domain=CONTRIB,
        K=width,
        N=node.size("scale", 0),
        bits=node["bits"],
        block_size=width // node.size("scale", 1),
        accuracy_level=_FLOAT_ARITHMETIC,
    )
    return _biased(b, node, product)


def dequantize(b: Builder, node: XfNode) -> ir.Value:
    """The weight in floats, then the product."""
    rows, groups = node.size("scale", 0), node.size("scale", 1)
    packed = b.reshape(node["weight"], rows, -1)
    width, bits = _width(node), node["bits"]
    weight = dequantize_groups(b, packed, node["scale"], node["zero"], axes=1, width=width, groups=groups, bits=bits)
    return _biased(b, node, b.op("MatMul", node["x"], b.op("Transpose", weight, perm=[1, 0])))


def _biased(b: Builder, node: XfNode, product: ir.Value) -> ir.Value:
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _width(node: XfNode) -> int:
    """Return the number of input channels."""
    return node.size("x", -1)


def _has_blocks(node: XfNode) -> Verdict:
    block = _width(node) // node.size("scale", 1)
    if node["bits"] not in _BITS:
        return f"MatMulNBits takes codes of 4 or 8 bits, not of {node['bits']}"
    if block not in _BLOCKS:
        return f"MatMulNBits takes groups of 16, 32, 64, 128 or 256, not of {block}"
    return None


FORMS = (
    Form("matmul_n_bits", matmul_n_bits, _has_blocks),
    Form("dequantize", dequantize, is_standard=True),
)
