"""The ONNX form of ``xf.windowed_linear_attention``: chunks with those around them, and running sums of states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks, product_with_transposed, running_sum
from xformopt.kernels.onnx_features import features_of_tokens, width_of, without_absent
from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import hide, lowest
from xformopt.kernels.windowed_linear_attention.reference import chunk_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# what a sum of weights is at least; in 16 bits, too
_TINY = 1e-7


def chunks(b: Builder, node: XfNode) -> ir.Value:
    """Both kinds of weights of each chunk with those around it, and the states of all beyond."""
    q, heads, width, causal = node["q"], node["heads"], node.size("v", -1), node["causal"]
    D, E, F, C = node.size("q", -1) // heads, width // heads, width_of(node, node["feature"]), chunk_of(node["window"])
    fq, fk = (features_of_tokens(b, node, name) for name in ("q", "k"))
    if node["key_mask"] is not None:
        fk = without_absent(b, fk, node["key_mask"], node["k"])
    queries, keys = (heads_in_chunks(b, x, heads, D, C) for x in (q, node["k"]))
    fq, fk = (heads_in_chunks(b, x, heads, F, C) for x in (fq, fk))
    values = heads_in_chunks(b, node["v"], heads, E, C)
    near, far = _kinds(C, node["window"], causal)

    logits = b.op("Mul", product_with_transposed(b, queries, _around(b, keys, causal)), b.scalar(node["scale"], q))
    logits = b.op("Add", logits, b.reshape(node["gain"], 1, heads, 1, 1, 1))  # [B, H, N, C, K]
    logits = hide(b, logits, b.op("And", _present(b, node, C), b.constant(near)), q)
    products = product_with_transposed(b, fq, _around(b, fk, causal))
    products = b.op("Mul", products, b.constant(far, q.dtype.numpy()))
    last = b.constant([-1], np.int64)
    columns = b.op("Transpose", fk, perm=[0, 1, 2, 4, 3])  # [B, H, N, F, C]
    states = _beyond(b, b.op("MatMul", columns, values), causal)
    sums = _beyond(b, b.op("ReduceSum", columns, last, keepdims=1), causal)
    apart = b.op("Add", b.op("ReduceSum", products, last, keepdims=1), b.op("MatMul", fq, sums))

    # all weights of a row are divided by the largest: of the near ones where there are no others
    none, top = b.scalar(0.0, q), b.op("ReduceMax", logits, last, keepdims=1)
    shrunk = b.op("Exp", b.op("Neg", b.op("Max", top, none)))
    top = b.op("Where", b.op("Greater", apart, none), b.op("Max", top, none), b.op("Max", top, lowest(b, q)))
    weights = b.op("Exp", b.op("Sub", logits, top))
    total = b.op("Add", b.op("ReduceSum", weights, last, keepdims=1), b.op("Mul", shrunk, apart))
    weights = b.op("Add", weights, b.op("Mul", products, shrunk))
    beyond = b.op("MatMul", b.op("Mul", fq, shrunk), states)
    attended = b.op("Add", b.op("MatMul", weights, _around(b, values, causal)), beyond)
    return from_chunks(b, b.op("Div", attended, b.op("Max", total, b.scalar(_TINY, q))), q, width)


FORMS = (Form("chunks", chunks, is_standard=True),)


def _kinds(C: int, window: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return which keys around a chunk weigh by softmax and which by features, ``[C, K]`` bool."""
    back = np.arange(C)[:, None] + C - np.arange(2 * C if causal else 3 * C)
    seen = back >= 0 if causal else np.ones_like(back, dtype=bool)
    near = np.abs(back) < window
    return near & seen, ~near & seen


def _present(b: Builder, node: XfNode, C: int) -> ir.Value:
    """Return which keys around a chunk exist, ``[B, 1, N, 1, K]`` bool; those that fill up the chunks do not."""
    q = node["q"]
    if node["key_mask"] is None:
        ones = b.op("Expand", b.scalar(1.0, q), b.op("Shape", q, start=0, end=2))
    else:
        ones = b.op("Cast", node["key_mask"], to=int(q.dtype))
    exists = b.op("Unsqueeze", ones, b.constant([-1], np.int64))
    exists.type = q.type
    around = _around(b, heads_in_chunks(b, exists, 1, 1, C), node["causal"])  # [B, 1, N, K, 1]
    return b.op("Greater", b.op("Transpose", around, perm=[0, 1, 2, 4, 3]), b.scalar(0.0, q))


def _around(b: Builder, x: ir.Value, causal: bool) -> ir.Value:
    """Return each chunk behind the one before it, and before the one after it where not causal, ``[B, H, N, K, .]``."""
    parts = [_moved(b, x, 1), x] if causal else [_moved(b, x, 1), x, _moved(b, x, -1)]
    return b.op("Concat", *parts, axis=3)


def _beyond(b: Builder, added: ir.Value, causal: bool) -> ir.Value:
    """Return the sum of what is further than the neighbours of each chunk, before it or on both sides."""
    before = running_sum(b, _moved(b, added, 1), 2, exclusive=True)
    if causal:
        return before
    after = b.op("CumSum", _moved(b, added, -1), b.constant(2, np.int64), exclusive=1, reverse=1)
    return b.op("Add", before, after)


def _moved(b: Builder, x: ir.Value, by: int) -> ir.Value:
    """Return chunks moved along their axis: zeros come in on one side, what leaves on the other is gone."""
    pads = np.zeros((2, 5), np.int64)
    pads[:, 2] = by, -by
    return b.op("Pad", x, b.constant(pads.reshape(-1)))
