"""ONNX forms of ``xf.toeplitz_attention``: by the Toeplitz matrix.

ONNX has a Fourier transform, but a head needs ``m (E + 1)`` of them each way.  By ONNX Runtime's DFT on one core, those
of a head with 32 features and values of width 32 took about four times as long as both products, for 1,024 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_features import apart, features
from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import distances

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_EPS = 1e-12


def products(b: Builder, node: XfNode) -> ir.Value:
    """Both products over all pairs, the weights of each distance between them."""
    heads, width, last = node["heads"], node.size("v", -1), b.constant([-1], np.int64)
    D = node.size("q", -1) // heads
    q, k = (_mapped(b, node, apart(b, node, node[name], D)) for name in ("q", "k"))
    v = apart(b, node, node["v"], width // heads)
    if node["key_mask"] is not None:
        exists = b.op("Unsqueeze", node["key_mask"], b.constant([1, 3], np.int64))
        k = b.op("Where", exists, k, b.scalar(0.0, node["q"]))
    products = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = b.op("Mul", products, _factors(b, node))
    total = b.op("ReduceSum", weights, last, keepdims=1)
    is_some = b.op("Greater", total, b.scalar(0.0, node["q"]))
    divisor = b.op("Where", is_some, total, b.scalar(1.0, node["q"]))
    attended = b.op("Div", b.op("MatMul", weights, v), divisor)
    return b.reshape(b.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, 0, width)


FORMS = (Form("products", products, is_standard=True),)


def _mapped(b: Builder, node: XfNode, x: ir.Value) -> ir.Value:
    """Return positive random features of what has length one, or what is given."""
    if node["projection"] is None:
        return x
    length = b.op("ReduceL2", x, b.constant([-1], np.int64), keepdims=1)
    return features(b, node, b.op("Div", x, b.op("Max", length, b.scalar(_EPS, node["q"]))), "positive")


def _factors(b: Builder, node: XfNode) -> ir.Value:
    """Return the weight of each pair's distance, ``[heads or 1, T, T]``."""
    bias = node["bias"]
    middle = b.op("Div", b.size(bias, 1), b.constant([2], np.int64))
    peak = b.op("ReduceMax", bias, b.constant([-1], np.int64), keepdims=1)
    factors = b.op("Exp", b.op("Sub", bias, peak))
    back = distances(b, b.size(node["q"], 1))
    pairs = b.op("Gather", factors, b.op("Sub", middle, back), axis=1)
    return b.op("Trilu", pairs, upper=0) if node["causal"] else pairs
