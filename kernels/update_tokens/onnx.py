"""ONNX forms of ``xf.update_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import ascending

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def scatter_rows(b: Builder, node: XfNode) -> ir.Value:
    """ScatterND at pairs (row of the batch, token): whole rows."""
    stored, kept = node["stored"], b.op("Unsqueeze", node["kept"], b.constant([2], np.int64))
    rows = b.op("Unsqueeze", ascending(b, b.constant(0, np.int64), b.size(stored, 0)), b.constant([1, 2], np.int64))
    rows = b.op("Expand", rows, b.op("Shape", kept))
    return b.op("ScatterND", stored, b.op("Concat", rows, kept, axis=2), node["tokens"])


def scatter_elements(b: Builder, node: XfNode) -> ir.Value:
    """ScatterElements, with each index repeated for every channel."""
    indices = b.op("Unsqueeze", node["kept"], b.constant([2], np.int64))
    sizes = b.op("Concat", b.constant([1, 1], np.int64), b.size(node["stored"], 2), axis=0)
    return b.op("ScatterElements", node["stored"], b.op("Expand", indices, sizes), node["tokens"], axis=1)


FORMS = (
    Form("scatter_rows", scatter_rows, is_standard=True),
    Form("scatter_elements", scatter_elements, is_standard=True),
)
