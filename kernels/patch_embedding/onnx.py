"""ONNX forms of ``xf.patch_embedding``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def convolution(b: Builder, node: XfNode) -> ir.Value:
    """A convolution whose stride is its kernel."""
    patch = [node.size("weight", 2), node.size("weight", 3)]
    tokens = b.op("Conv", node["image"], node["weight"], node["bias"], kernel_shape=patch, strides=patch)
    return b.op("Transpose", b.reshape(tokens, 0, node.size("weight", 0), -1), perm=[0, 2, 1])


def matmul(b: Builder, node: XfNode) -> ir.Value:
    """The patches cut out, then one matrix product."""
    width, channels, rows, columns = (node.size("weight", axis) for axis in range(4))
    height, breadth = node.size("image", 2), node.size("image", 3)
    size = channels * rows * columns
    cut = b.reshape(node["image"], 0, channels, height // rows, rows, breadth // columns, columns)
    patches = b.op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
    flat = b.reshape(patches, 0, height // rows * (breadth // columns), size)
    matrix = b.derive(node["weight"], "matrix", (size, width), lambda array: array.reshape(width, size).T)
    product = b.op("MatMul", flat, matrix)
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _is_whole(node: XfNode) -> Verdict:
    if node["weight"].const_value is None:
        return "the weight is not a constant"
    if not all(isinstance(size, int) for size in node.shape("image")[2:]):
        return "the image's size is dynamic"
    rests = [node.size("image", axis) % node.size("weight", axis) for axis in (2, 3)]
    return "the patches do not fill the image" if any(rests) else None


FORMS = (
    Form("convolution", convolution, is_standard=True),
    Form("matmul", matmul, _is_whole, is_standard=True),
)
