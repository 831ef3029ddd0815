"""ONNX forms of ``xf.glu``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def apart(b: Builder, node: XfNode) -> ir.Value:
    """The activation, then the product."""
    gate = node["gate"]
    return b.op("Mul", b.xf("activation", gate, like=gate, function=node["function"]), node["up"])


FORMS = (Form("apart", apart, is_standard=True),)
