"""The ONNX form of ``xf.unpack_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def scatter(b: Builder, node: XfNode) -> ir.Value:
    """ScatterND of whole rows into zeros."""
    x, mask = node["x"], node["mask"]
    batch, length, width = b.size(mask, 0), b.size(mask, 1), b.size(x, 2)
    zeros = b.op("Expand", b.scalar(0.0, x), b.op("Concat", b.op("Mul", batch, length), width, axis=0))
    indices = b.op("Unsqueeze", node["places"], b.constant([1], np.int64))
    rows = b.op("ScatterND", zeros, indices, b.op("Squeeze", x, b.constant([0], np.int64)))
    return b.reshape(rows, batch, length, width)


FORMS = (Form("scatter", scatter, is_standard=True),)
