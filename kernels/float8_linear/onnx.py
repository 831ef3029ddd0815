"""The ONNX form of ``xf.float8_linear``: the two operators it is made of, in float."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.float8_linear.reference import FORMAT
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def apart(b: Builder, node: XfNode) -> ir.Value:
    """Round, then multiply."""
    x = node["x"]
    rounded = b.xf("fake_quantize_float", x, like=x, format=FORMAT)
    rounded.type, rounded.shape = x.type, x.shape
    operands = (node[name] for name in ("weight", "scale", "base", "bias"))
    found: ir.Value = b.xf("float_weight_linear", rounded, *operands, like=x, format=FORMAT)
    return found


FORMS = (Form("apart", apart, is_standard=True),)
