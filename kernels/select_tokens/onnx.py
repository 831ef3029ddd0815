"""ONNX forms of ``xf.select_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import gather_tokens

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def gather_rows(b: Builder, node: XfNode) -> ir.Value:
    """GatherND over the batch: whole rows."""
    return gather_tokens(b, node["x"], node["kept"])


def gather_elements(b: Builder, node: XfNode) -> ir.Value:
    """GatherElements, with each index repeated for every channel."""
    indices = b.op("Unsqueeze", node["kept"], b.constant([2], np.int64))
    sizes = b.op("Concat", b.constant([1, 1], np.int64), b.size(node["x"], 2), axis=0)
    return b.op("GatherElements", node["x"], b.op("Expand", indices, sizes), axis=1)


FORMS = (
    Form("gather_rows", gather_rows, is_standard=True),
    Form("gather_elements", gather_elements, is_standard=True),
)
