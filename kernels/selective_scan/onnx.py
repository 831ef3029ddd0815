"""ONNX forms of ``xf.selective_scan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_chunks import first_state
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def scan(b: Builder, node: XfNode) -> ir.Value:
    """The recurrence: a Scan over the tokens, whose states are never stored."""
    x, dt = node["x"], node["dt"]
    C, N = node.size("x", -1), node.size("b", -1)
    row, column = b.constant([2], np.int64), b.constant([3], np.int64)
    items = [
        b.op("Unsqueeze", dt, column),  # [B, T, C, 1]
        b.op("Unsqueeze", b.op("Mul", dt, x), column),
        b.op("Unsqueeze", node["b"], row),  # [B, T, 1, N]
        b.op("Unsqueeze", node["c"], column),  # [B, T, N, 1]
    ]
    for value in items:
        value.type = x.type

    def step(
        inner: Builder, state: Sequence[ir.Value], item: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        kept = inner.op("Mul", inner.op("Exp", inner.op("Mul", item[0], node["a"])), state[0])
        reached = inner.op("Add", kept, inner.op("Mul", item[1], item[2]))
        return [reached], [inner.op("MatMul", reached, item[3])]

    _, (outputs,) = b.scan(step, [first_state(b, x, C, N)], items, axis=1)
    y = b.reshape(outputs, 0, -1, C)
    return y if node["d"] is None else b.op("Add", y, b.op("Mul", node["d"], x))


FORMS = (Form("scan", scan, is_standard=True),)
