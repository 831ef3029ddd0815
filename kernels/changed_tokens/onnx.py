"""The ONNX form of ``xf.changed_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import count

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def top(b: Builder, node: XfNode) -> ir.Value:
    """TopK of all tokens, of which the ranks are taken; of equal errors it takes the first."""
    change = b.op("Sub", node["x"], node["reference"])
    error = b.op("ReduceSumSquare", change, b.constant([2], np.int64), keepdims=0)
    _, order = b.ops("TopK", error, count(b, node, "x"), outputs=2, axis=1)
    return b.op("Gather", order, node["ranks"], axis=1)


FORMS = (Form("top", top, is_standard=True),)
