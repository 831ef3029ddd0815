"""The ONNX form of ``xf.prob_sparse_attention``.

As many queries attend in each head, so that TopK finds them and Gather brings their rows together, ``[B, H, u, ...]``;
what they get is scattered over the means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_gathered import GatheredAttention
from xformopt.kernels.onnx_softmax import hide

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# below every rating
_LAST = -3e4
_INT64, _DOUBLE, _BOOL, _UINT8 = 7, 11, 9, 2  # of TensorProto


def gathered(b: Builder, node: XfNode) -> ir.Value:
    """The queries that attend, gathered, and means."""
    writer = _Writer(b, node)
    chosen = writer.best()
    numbers = b.op("Add", chosen, writer.start)  # [B, H, u] among the queries of all heads
    flat = b.reshape(writer.means(), -1, writer.depth("v"))
    places = b.op("Unsqueeze", numbers, writer.ints(-1))
    mixed = b.op("ScatterND", flat, places, writer.attended(chosen, numbers))
    apart = b.reshape(mixed, -1, node["heads"], writer.length, writer.depth("v"))
    return writer.joined(apart)


FORMS = (Form("gathered", gathered, is_standard=True),)


class _Writer(GatheredAttention):
    """Writes one node; ``u`` (in shapes) is how many queries attend."""

    def best(self) -> ir.Value:
        """Return the queries that attend, ``[B, H, u]``."""
        b, node, q = self.b, self.node, self.node["q"]
        share = b.op("Mul", b.op("Cast", node["sample"], to=_DOUBLE), b.op("Cast", self.length, to=_DOUBLE))
        places = b.op("Min", b.op("Cast", share, to=_INT64), b.op("Sub", self.length, self.ints(1)))  # [U]
        sampled = b.op("Gather", self.keys, places, axis=2)
        logits = b.op("MatMul", self.queries, b.op("Transpose", sampled, perm=[0, 1, 3, 2]))  # [B, H, T, U]
        if self.bias is not None:
            logits = b.op("Add", logits, b.op("Gather", self.bias, places, axis=3))
        last, dtype = self.ints(-1), int(q.dtype)
        if self.exists is None:
            peak, mean = (b.op(kind, logits, last, keepdims=0) for kind in ("ReduceMax", "ReduceMean"))
            rating = b.op("Sub", peak, mean)
        else:
            seen = b.op("Unsqueeze", b.op("Gather", self.exists, places, axis=1), self.ints(1, 2))  # [B, 1, 1, U]
            peak = b.op("ReduceMax", hide(b, logits, b.op("Cast", seen, to=_BOOL), q), last, keepdims=0)
            count = b.op("ReduceSum", b.op("Cast", seen, to=dtype), last, keepdims=0)  # [B, 1, 1]
            total = b.op("ReduceSum", b.op("Mul", logits, b.op("Cast", seen, to=dtype)), last, keepdims=0)
            rated = b.op("Sub", peak, b.op("Div", total, b.op("Max", count, b.scalar(1.0, q))))
            some = b.op("Where", b.op("Greater", count, b.scalar(0.0, q)), rated, b.scalar(0.0, q))
            own = b.op("Unsqueeze", b.op("Cast", self.exists, to=_BOOL), self.ints(1))  # [B, 1, T]
            rating = b.op("Where", own, some, b.scalar(_LAST, q))
        folds = b.op("Log", b.op("Cast", self.length, to=_DOUBLE))
        wanted = b.op("Cast", b.op("Ceil", b.op("Mul", folds, b.constant(node["factor"], np.float64))), to=_INT64)
        count = b.op("Min", b.op("Max", wanted, self.ints(1)), self.length)
        return b.ops("TopK", rating, count, outputs=2, axis=-1)[1]

    def attended(self, chosen: ir.Value, numbers: ir.Value) -> ir.Value:
        """Return what the chosen queries attend to, ``[B, H, u, E]``; ``numbers`` are theirs among all heads'."""
        b, q = self.b, self.node["q"]
        rows = self.rows(self.queries, "q", numbers)
        logits = b.op("MatMul", rows, b.op("Transpose", self.keys, perm=[0, 1, 3, 2]))  # [B, H, u, T]
        if self.bias is not None:
            flat = b.reshape(self.bias, -1, self.length)
            logits = b.op("Add", logits, b.op("Gather", flat, self.rows_of_bias(chosen), axis=0))
        visible = self._visible(chosen)
        if visible is None:
            return b.op("MatMul", b.op("Softmax", logits, axis=-1), self.values)
        attended = b.op("MatMul", b.op("Softmax", hide(b, logits, visible, q), axis=-1), self.values)
        sees = b.op("ReduceMax", b.op("Cast", visible, to=int(q.dtype)), self.ints(-1), keepdims=1)
        return b.op("Mul", attended, sees)

    def means(self) -> ir.Value:
        """Return what queries get that do not attend, ``[B, H, T, E]``."""
        b, v, q = self.b, self.values, self.node["q"]
        known = b.op("Expand", b.constant(1, np.uint8), b.op("Shape", q, start=0, end=2))
        if self.exists is not None:
            known = self.exists
        counts = b.op("Unsqueeze", b.op("Cast", known, to=int(q.dtype)), self.ints(1, 3))  # [B, 1, T, 1]
        if self.exists is not None:
            v = b.op("Mul", v, counts)
        if self.node["causal"]:
            total, count = (b.op("CumSum", x, b.constant(2, np.int64)) for x in (v, counts))
        else:
            total, count = (b.op("ReduceSum", x, self.ints(2), keepdims=1) for x in (v, counts))
        mean = b.op("Div", total, b.op("Max", count, b.scalar(1.0, q)))
        return mean if self.node["causal"] else b.op("Expand", mean, b.op("Shape", self.values))

    def _visible(self, chosen: ir.Value) -> ir.Value | None:
        """Return which keys the chosen queries see, ``[B, 1 or H, 1 or u, T]``, or None for all."""
        b = self.b
        visible = None
        if self.exists is not None:
            visible = b.op("Unsqueeze", b.op("Cast", self.exists, to=_BOOL), self.ints(1, 2))
        if self.node["causal"]:
            at = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", self.length), b.constant(1, np.int64))
            earlier = b.op("LessOrEqual", at, b.op("Unsqueeze", chosen, self.ints(-1)))
            visible = earlier if visible is None else b.op("And", visible, earlier)
        return visible
