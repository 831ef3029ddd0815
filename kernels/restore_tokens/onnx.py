"""The ONNX form of ``xf.restore_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import gather_tokens, into

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def gather(b: Builder, node: XfNode) -> ir.Value:
    """The place of every token, then whole rows."""
    return gather_tokens(b, node["x"], into(b, node["kept"], node["sources"], node["destinations"]))


FORMS = (Form("gather", gather, is_standard=True),)
