"""The ONNX form of ``xf.routing_attention``: TopK finds the members of all clusters, Gather brings them together."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_gathered import GatheredAttention
from xformopt.kernels.onnx_softmax import hide
from xformopt.kernels.routing_attention.reference import EPS

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# below every product with a centroid
_LAST = -3e4
_BOOL = 9  # TensorProto.BOOL


def clustered(b: Builder, node: XfNode) -> ir.Value:
    """Clusters are an axis, and all products are batched ones.

    What a token gets of several clusters is added up by ScatterElements: ONNX Runtime's ScatterND adds in parallel.
    """
    writer = _Writer(b, node)
    attended, sees = writer.attended()
    total, count = (writer.added(x) for x in (attended, sees))
    return writer.joined(b.op("Div", total, b.op("Max", count, b.scalar(1.0, node["q"]))))


FORMS = (Form("clustered", clustered, is_standard=True),)


class _Writer(GatheredAttention):
    """Writes one node; ``C`` (in shapes) are the clusters, ``w`` the tokens of one, and ``u = C w``."""

    @property
    def clusters(self) -> int:
        """C."""
        return self.node.size("centroids", 1)

    @cached_property
    def of_queries(self) -> ir.Value:
        """The queries of each cluster, ``[B, H, u]``."""
        return self._members("q")

    @cached_property
    def of_keys(self) -> ir.Value:
        """The keys of each cluster, ``[B, H, u]``."""
        return self.of_queries if self.node["causal"] else self._members("k")

    def attended(self) -> tuple[ir.Value, ir.Value]:
        """Return what each query gets in each of its clusters, ``[B, H, u, E]``, and whether it sees a key there."""
        b, q = self.b, self.node["q"]
        asking = self._take(self.queries, "q", self.of_queries)  # [B, H, C, w, D]
        keys, values = (self._take(x, name, self.of_keys) for x, name in ((self.keys, "k"), (self.values, "v")))
        logits = b.op("MatMul", asking, b.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))  # [B, H, C, w, w]
        if self.bias is not None:
            rows = b.op("Mul", self._apart(self.rows_of_bias(self.of_queries), 1), self.length)
            places = b.op("Add", rows, self._beside(self.of_keys))
            logits = b.op("Add", logits, b.op("Gather", b.reshape(self.bias, -1), places, axis=0))
        sees = b.op("Expand", b.scalar(1.0, q), b.op("Shape", self._rows_of(self.of_queries)))
        visible = self._visible()
        if visible is not None:
            logits = hide(b, logits, visible, q)
            some = b.op("ReduceMax", b.op("Cast", visible, to=int(q.dtype)), self.ints(-1), keepdims=1)
            every = b.op("Expand", some, b.op("Shape", self._apart(self.of_queries, 1)))  # [B, H, C, w, 1]
            sees = b.reshape(every, 0, 0, -1, 1)
        attended = b.reshape(b.op("MatMul", b.op("Softmax", logits, axis=-1), values), 0, 0, -1, self.depth("v"))
        return (attended if visible is None else b.op("Mul", attended, sees)), sees

    def added(self, x: ir.Value) -> ir.Value:
        """Return ``[B, H, u, N]`` added up by tokens, ``[B, H, T, N]``."""
        b = self.b
        size = b.op("Shape", x, start=3, end=4)
        sizes = b.op("Concat", b.op("Shape", self.queries, start=0, end=3), size, axis=0)
        places = b.op("Expand", self._rows_of(self.of_queries), b.op("Shape", x))
        nothing = b.op("Expand", b.scalar(0.0, self.node["q"]), sizes)
        return b.op("ScatterElements", nothing, places, x, axis=2, reduction="add")

    def _members(self, name: str) -> ir.Value:
        b, x = self.b, self.node[name]
        vectors = self.heads(x, name)
        ones = b.constant(np.ones(self.depth(name)), x.dtype.numpy())
        routed = b.op("LayerNormalization", vectors, ones, axis=-1, epsilon=EPS)
        products = b.op("MatMul", self.node["centroids"], b.op("Transpose", routed, perm=[0, 1, 3, 2]))  # [B, H, C, T]
        if self.exists is not None:
            there = b.op("Unsqueeze", b.op("Cast", self.exists, to=_BOOL), self.ints(1, 2))
            products = b.op("Where", there, products, b.scalar(_LAST, x))
        size = b.op("Div", b.op("Add", self.length, self.ints(self.clusters - 1)), self.ints(self.clusters))
        return b.reshape(b.ops("TopK", products, size, outputs=2, axis=-1)[1], 0, 0, -1)

    def _visible(self) -> ir.Value | None:
        """Return which keys of its cluster a query sees, ``[B, H, C, 1 or w, w]``, or None for all."""
        b = self.b
        visible = None
        if self.exists is not None:
            items = b.op("Mul", b.reshape(self.numbers(1), -1, 1, 1), self.length)
            there = b.op("Gather", b.reshape(self.exists, -1), b.op("Add", self.of_keys, items), axis=0)
            visible = self._beside(b.op("Cast", there, to=_BOOL))
        if self.node["causal"]:
            earlier = b.op("LessOrEqual", self._beside(self.of_keys), self._apart(self.of_queries, 1))
            visible = earlier if visible is None else b.op("And", visible, earlier)
        return visible

    def _take(self, x: ir.Value, name: str, members: ir.Value) -> ir.Value:
        """Return the rows of ``[B, H, T, N]`` that each cluster takes, ``[B, H, C, w, N]``."""
        return self._apart(self.rows(x, name, self.b.op("Add", members, self.start)), self.depth(name))

    def _apart(self, x: ir.Value, width: int) -> ir.Value:
        """Turn ``[B, H, u]`` or ``[B, H, u, width]`` into ``[B, H, C, w, width]``."""
        return self.b.reshape(x, 0, 0, self.clusters, -1, width)

    def _beside(self, x: ir.Value) -> ir.Value:
        """Turn ``[B, H, u]`` into ``[B, H, C, 1, w]``."""
        return self.b.reshape(x, 0, 0, self.clusters, 1, -1)

    def _rows_of(self, members: ir.Value) -> ir.Value:
        return self.b.op("Unsqueeze", members, self.ints(-1))
