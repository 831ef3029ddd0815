"""ONNX forms of ``xf.quantized_embedding``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode
from xformopt.kernels.onnx_packing import dequantize_groups

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# GatherBlockQuantized takes blocks of a power of two from here on
_SMALLEST_BLOCK = 16


def gather_block_quantized(b: Builder, node: XfNode) -> ir.Value:
    """ONNX Runtime's look-up in a packed table."""
    return b.op(
        "GatherBlockQuantized",
        node["weight"],
        node["indices"],
        node["scale"],
        node["zero"],
        domain=CONTRIB,
        bits=node["bits"],
        block_size=_width(node) // node.size("scale", 1),
        gather_axis=0,
        quantize_axis=1,
    )


def gather(b: Builder, node: XfNode) -> ir.Value:
    """The packed rows, then their values."""
    packed, scale, zero = (
        None if node[name] is None else b.op("Gather", node[name], node["indices"])
        for name in ("weight", "scale", "zero")
    )
    assert packed is not None
    assert scale is not None
    axes = len(node.shape("indices"))
    groups = node.size("scale", 1)
    return dequantize_groups(b, packed, scale, zero, axes=axes, width=_width(node), groups=groups, bits=node["bits"])


def _width(node: XfNode) -> int:
    return node.size("weight", 1) * 8 // int(node["bits"])


def _has_blocks(node: XfNode) -> Verdict:
    block = _width(node) // node.size("scale", 1)
    if block < _SMALLEST_BLOCK or block & (block - 1):
        return f"GatherBlockQuantized takes groups of 16, 32, 64, ..., not of {block}"
    return None


FORMS = (
    Form("gather_block_quantized", gather_block_quantized, _has_blocks, is_for_processors=True),
    Form("gather", gather, is_standard=True),
)
