"""The ONNX form of ``xf.rank_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_tokens import count, per_row

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def top(b: Builder, node: XfNode) -> ir.Value:
    """TopK of what is behind the prefix; of equal scores it takes the first."""
    scores, prefix = node["scores"], node["prefix"]
    first, axis = b.constant([prefix], np.int64), b.constant([1], np.int64)
    length = count(b, node, "scores")
    behind = b.op("Slice", scores, first, b.constant([np.iinfo(np.int64).max], np.int64), axis) if prefix else scores
    stay = b.op("Sub", b.op("Sub", length, first), b.constant([node["r"]], np.int64))
    _, order = b.ops("TopK", behind, stay, outputs=2, axis=1)
    if not prefix:
        return order
    return b.op(
        "Concat", per_row(b, b.constant(np.arange(prefix), np.int64), scores), b.op("Add", order, first), axis=1
    )


FORMS = (Form("top", top, is_standard=True),)
