"""ONNX forms of ``xf.delta_rule_resumed``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.delta_rule.onnx import scanned
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def chunked(b: Builder, node: XfNode) -> tuple[ir.Value, ir.Value]:
    """Chunkwise, from the given state to the last."""
    return scanned(b, node, node["state"])


FORMS = (Form("chunked", chunked, is_standard=True),)
