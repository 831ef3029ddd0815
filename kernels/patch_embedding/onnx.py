"""ONNX forms of ``xf.patch_embedding``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def convolution(b: Builder, node: XfNode) -> ir.Value:
    """A convolution whose stride is its kernel."""
    width, _, *patch = node.shape("weight")
    assert isinstance(width, int)
    tokens = b.op("Conv", node["image"], node["weight"], node["bias"], kernel_shape=patch, strides=patch)
    return b.op("Transpose", b.reshape(tokens, 0, width, -1), perm=[0, 2, 1])


def matmul(b: Builder, node: XfNode) -> ir.Value:
    """The patches cut out, then one matrix product."""
    width, channels, rows, columns = _sizes(node, "weight")
    height, breadth = _sizes(node, "image")[-2:]
    size = channels * rows * columns
    cut = b.reshape(node["image"], 0, channels, height // rows, rows, breadth // columns, columns)
    patches = b.op("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
    flat = b.reshape(patches, 0, height // rows * (breadth // columns), size)
    matrix = b.derive(node["weight"], "matrix", (size, width), lambda array: array.reshape(width, size).T)
    product = b.op("MatMul", flat, matrix)
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _sizes(node: XfNode, name: str) -> list[int]:
    return [size if isinstance(size, int) else 0 for size in node.shape(name)]


def _is_whole(node: XfNode) -> Verdict:
    if node["weight"].const_value is None:
        return "the weight is not a constant"
    image, weight = node.shape("image"), node.shape("weight")
    if not all(isinstance(size, int) for size in image[1:]):
        return "the image's size is dynamic"
    (_, _, height, breadth), (_, _, rows, columns) = _sizes(node, "image"), _sizes(node, "weight")
    divides = math.prod(weight[1:]) and not height % rows and not breadth % columns  # type: ignore[arg-type]
    return None if divides else "the patches do not fill the image"


FORMS = (
    Form("convolution", convolution, is_standard=True),
    Form("matmul", matmul, _is_whole, is_standard=True),
)
