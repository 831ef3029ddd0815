"""ONNX forms of ``xf.activation``: one operator where the runtime has one, or the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def _accepts(*functions: str) -> Callable[[XfNode], Verdict]:
    def accepts(node: XfNode) -> Verdict:
        function = node["function"]
        return None if function in functions else f"it has no {function}"

    return accepts


def contrib(b: Builder, node: XfNode) -> ir.Value:
    """ONNX Runtime's fused operators (silu is the quick GELU with slope 1)."""
    x, function = node["x"], node["function"]
    if function == "gelu":
        return b.op("Gelu", x, domain=CONTRIB)
    if function == "gelu_tanh":
        return b.op("FastGelu", x, domain=CONTRIB)
    return b.op("QuickGelu", x, domain=CONTRIB, alpha=1.702 if function == "gelu_quick" else 1.0)


def standard(b: Builder, node: XfNode) -> ir.Value:
    """The operators of the ONNX standard."""
    x, function = node["x"], node["function"]
    if function == "relu":
        return b.op("Relu", x)
    return b.op("Gelu", x, approximate="tanh" if function == "gelu_tanh" else "none")


def formula(b: Builder, node: XfNode) -> ir.Value:
    """The definition, in elementwise operators."""
    x, function = node["x"], node["function"]

    def times(value: ir.Value, factor: float) -> ir.Value:
        return b.op("Mul", value, b.scalar(factor, x))

    def plus(value: ir.Value, term: float) -> ir.Value:
        return b.op("Add", value, b.scalar(term, x))

    if function == "relu":
        return b.op("Relu", x)
    if function == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    if function == "gelu_quick":
        return b.op("Mul", x, b.op("Sigmoid", times(x, 1.702)))
    if function == "gelu":
        erf = b.op("Erf", times(x, math.sqrt(0.5)))
        return b.op("Mul", times(x, 0.5), plus(erf, 1.0))
    # tanh(u) + 1 is 2 sigmoid(2 u): one transcendental function and one multiplication less
    slope = 2 * math.sqrt(2 / math.pi)
    inner = b.op("Mul", x, plus(times(b.op("Mul", x, x), 0.044715 * slope), slope))
    return b.op("Mul", x, b.op("Sigmoid", inner))


FORMS = (
    Form("standard", standard, _accepts("gelu", "gelu_tanh", "relu"), is_standard=True),
    Form("contrib", contrib, _accepts("gelu", "gelu_tanh", "gelu_quick", "silu")),
    Form("formula", formula, is_standard=True),
)
