"""The ONNX form of ``xf.mra_attention``.

The blocks that are exact are as many in each head, so that TopK finds them and Gather brings them side by side,
``[B, H, m, ...]``.  Each is computed by itself; the blocks of one row are then added up by a product with a matrix of
zeros and ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import Weighted, bounded, distances, hide, lowest, mean_of, weighted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# above every score: blocks on the diagonal come first
_FIRST = 1e4
_INT64, _DOUBLE, _BOOL, _UINT8 = 7, 11, 9, 2  # of TensorProto


def gathered(b: Builder, node: XfNode) -> ir.Value:
    """Only the blocks that are exact, gathered; means of the others."""
    writer = _Writer(b, node)
    scores = writer.scores()
    places = writer.best(scores)
    parts = [writer.exact(places)]
    if node["coarse"]:
        parts.append(writer.means(scores, places))
    attended = mean_of(b, node["q"], *parts)  # [B, H, N, b, E]
    tokens = b.reshape(b.op("Transpose", attended, perm=[0, 2, 3, 1, 4]), 0, -1, node.size("v", -1))
    return b.op("Slice", tokens, b.constant([0], np.int64), b.size(node["q"], 1), b.constant([1], np.int64))


FORMS = (Form("gathered", gathered, is_standard=True),)


@dataclass
class _Writer:
    """Writes one node; ``N`` is the number of blocks, ``b`` (in shapes) their size, ``m`` how many are exact."""

    b: Builder
    node: XfNode

    def __post_init__(self) -> None:
        self.heads, self.block = self.node["heads"], self.node["block"]
        self.one = self.ints(1)

    def ints(self, *values: int) -> ir.Value:
        """Return integers as a tensor with one axis."""
        return self.b.constant(values, np.int64)

    @cached_property
    def count(self) -> ir.Value:
        """N, as a tensor of one element."""
        up = self.b.op("Add", self.b.size(self.node["q"], 1), self.ints(self.block - 1))
        return self.b.op("Div", up, self.ints(self.block))

    @cached_property
    def missing(self) -> ir.Value:
        """How many tokens fill up the last block, as a tensor of one element."""
        whole = self.b.op("Mul", self.count, self.ints(self.block))
        return self.b.op("Sub", whole, self.b.size(self.node["q"], 1))

    @cached_property
    def exists(self) -> ir.Value:
        """Which tokens exist, ``[B, 1, N, b]`` in the type of q."""
        b, q = self.b, self.node["q"]
        if self.node["key_mask"] is None:
            known = b.op("Expand", b.constant(1, np.uint8), b.op("Shape", q, start=0, end=2))
        else:
            known = b.op("Cast", self.node["key_mask"], to=_UINT8)
        padded = b.op("Pad", known, b.op("Concat", self.ints(0, 0, 0), self.missing, axis=0))
        return b.op("Cast", b.reshape(padded, 0, 1, -1, self.block), to=int(q.dtype))

    @cached_property
    def sizes(self) -> ir.Value:
        """How many tokens of each block exist, ``[B, 1, N, 1]``."""
        return self.b.op("ReduceSum", self.exists, self.ints(-1), keepdims=1)

    @cached_property
    def filled(self) -> ir.Value:
        """The same, at least 1."""
        return self.b.op("Max", self.sizes, self.b.scalar(1.0, self.node["q"]))

    @cached_property
    def visible(self) -> ir.Value:
        """Which blocks have a key that a query may see, ``[B, 1, 1 or N, N]``."""
        has = self.b.op("Greater", self._across(self.sizes), self.b.scalar(0.0, self.node["q"]))
        if not self.node["causal"]:
            return has
        earlier = self.b.op("GreaterOrEqual", distances(self.b, self.count), self.b.constant(0, np.int64))
        return self.b.op("And", has, earlier)

    @cached_property
    def pairs(self) -> ir.Value | None:
        """The bias by blocks, ``[., ., N, N, b, b]``."""
        b, bias = self.b, self.node["bias"]
        if bias is None:
            return None
        pads = b.op("Concat", self.ints(*[0] * 6), self.missing, self.missing, axis=0)
        padded = b.op("Pad", bounded(b, bias, self.node["q"]), pads)
        cut = b.reshape(padded, 0, 0, self.count, self.block, self.count, self.block)
        return b.op("Transpose", cut, perm=[0, 1, 2, 4, 3, 5])

    def blocks(self, name: str) -> ir.Value:
        """Return queries, keys or values by blocks, ``[B, H, N, b, .]``."""
        if name not in self._blocks:
            b = self.b
            pads = b.op("Concat", self.ints(0, 0, 0, 0), self.missing, self.ints(0), axis=0)
            cut = b.reshape(b.op("Pad", self.node[name], pads), 0, -1, self.block, self.heads, self.depth(name))
            self._blocks[name] = b.op("Transpose", cut, perm=[0, 3, 1, 2, 4])
        return self._blocks[name]

    @cached_property
    def _blocks(self) -> dict[str, ir.Value]:
        return {}

    def depth(self, name: str) -> int:
        """Return the width of a head."""
        return self.node.size(name, -1) // int(self.heads)

    def mean(self, name: str) -> ir.Value:
        """Return the mean over the tokens of each block that exist, ``[B, H, N, .]``."""
        b, x = self.b, self.blocks(name)
        if self.node["key_mask"] is not None:
            x = b.op("Mul", x, b.op("Unsqueeze", self.exists, self.ints(-1)))
        return b.op("Div", b.op("ReduceSum", x, self.ints(3), keepdims=0), self.filled)

    def scores(self) -> ir.Value:
        """Return the logits of the means, ``[B, H, N, N]``."""
        b = self.b
        q = b.op("Mul", self.mean("q"), b.scalar(self.node["scale"], self.node["q"]))
        scores = b.op("MatMul", q, b.op("Transpose", self.mean("k"), perm=[0, 1, 3, 2]))
        if self.pairs is None:
            return scores
        rows = b.op("Unsqueeze", self.exists, self.ints(3, 5))  # [B, 1, N, 1, b, 1]
        columns = b.op("Unsqueeze", self.exists, self.ints(2, 4))  # [B, 1, 1, N, 1, b]
        known = b.op("Mul", b.op("Mul", self.pairs, rows), columns)
        total = b.op("ReduceSum", known, self.ints(-2, -1), keepdims=0)
        return b.op("Add", scores, b.op("Div", total, b.op("Mul", self.filled, self._across(self.filled))))

    def best(self, scores: ir.Value) -> ir.Value:
        """Return the places of the blocks that are exact, ``[B, H, m]`` in a matrix of ``N * N``."""
        b, q, N = self.b, self.node["q"], self.count
        used = b.op("And", self.visible, b.op("Greater", self.sizes, b.scalar(0.0, q)))
        ranked = b.op("Where", used, scores, b.scalar(-_FIRST, q))
        diagonal = b.op("Equal", distances(b, N), b.constant(0, np.int64))
        flat = b.reshape(b.op("Where", diagonal, b.scalar(_FIRST, q), ranked), 0, self.heads, -1)
        every = b.op("Mul", N, N)
        if self.node["causal"]:
            every = b.op("Div", b.op("Add", every, N), self.ints(2))
        share = b.op("Mul", b.op("Cast", every, to=_DOUBLE), b.constant(self.node["keep"], np.float64))
        wanted = b.op("Max", N, b.op("Cast", b.op("Ceil", share), to=_INT64))
        return b.ops("TopK", flat, wanted, outputs=2, axis=-1, sorted=0)[1]

    def exact(self, places: ir.Value) -> Weighted:
        """Return the sums over the blocks that are exact, of all rows: ``[B, H, N, b, .]``."""
        b, q, block = self.b, self.node["q"], self.block
        row = b.op("Div", places, self.count)
        column = b.op("Sub", places, b.op("Mul", row, self.count))
        start = b.op("Mul", b.reshape(self._numbers(self.heads), -1, self.heads, 1), self.count)  # [B, H, 1]
        rows, columns = b.op("Add", row, start), b.op("Add", column, start)
        queries, keys, values = (
            self._taken(self.blocks(name), at, block, self.depth(name))
            for name, at in (("q", rows), ("k", columns), ("v", columns))
        )
        scaled = b.op("Mul", queries, b.scalar(self.node["scale"], q))
        logits = b.op("MatMul", scaled, b.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))  # [B, H, m, b, b]
        if self.pairs is not None:
            logits = b.op("Add", logits, self._taken(self.pairs, self._of_bias(places), block, block))
        logits = hide(b, logits, self._seen(row, column), q)
        peaks = b.op("Max", b.op("ReduceMax", logits, self.ints(-1), keepdims=0), lowest(b, q))  # [B, H, m, b]
        peak = self._largest(places, peaks)  # [B, H, N, b]
        here = b.op("Gather", b.reshape(peak, -1, block), rows, axis=0)
        weights = b.op("Exp", b.op("Sub", logits, b.op("Unsqueeze", here, self.ints(-1))))
        sums = (b.op("MatMul", weights, values), b.op("ReduceSum", weights, self.ints(-1), keepdims=1))
        width = self.depth("v")
        beside = b.reshape(b.op("Concat", *sums, axis=-1), 0, 0, 0, block * (width + 1))
        numbers = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", self.count), b.constant(1, np.int64))
        belongs = b.op("Equal", b.op("Unsqueeze", row, self.ints(2)), b.op("Unsqueeze", numbers, self.one))
        added = b.op("MatMul", b.op("Cast", belongs, to=int(q.dtype)), beside)
        apart = b.reshape(added, 0, 0, 0, block, width + 1)
        last = self.ints(-1)
        total = b.op("Slice", apart, self.ints(0), self.ints(width), last)
        weight = b.op("Slice", apart, self.ints(width), self.ints(width + 1), last)
        return Weighted(total, weight, b.op("Unsqueeze", peak, last))

    def means(self, scores: ir.Value, places: ir.Value) -> Weighted:
        """Return the sums over the means of all other blocks, ``[B, H, N, 1, .]``."""
        b, q = self.b, self.node["q"]
        nothing = b.op("Expand", b.constant(False), b.op("Shape", b.reshape(scores, 0, 0, -1)))
        chosen = b.op("Expand", b.constant(True), b.op("Shape", places))
        exact = b.reshape(b.op("ScatterElements", nothing, places, chosen, axis=2), 0, 0, self.count, self.count)
        counts = b.op("And", self.visible, b.op("Not", exact))
        several = b.op("Add", scores, b.op("Log", self._across(self.filled)))
        part = weighted(b, hide(b, several, counts, q), self.mean("v"), q)
        return Weighted(*(b.op("Unsqueeze", x, self.ints(3)) for x in part))

    def _seen(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """Return which keys of the chosen blocks count, ``[B, H, m, 1 or b, b]``."""
        b, block = self.b, self.block
        start = b.op("Mul", b.reshape(self._numbers(1), -1, 1, 1), self.count)  # [B, 1, 1]
        exists = b.op("Cast", b.reshape(self.exists, -1, block), to=_BOOL)
        keys = b.op("Unsqueeze", b.op("Gather", exists, b.op("Add", column, start), axis=0), self.ints(3))
        if not self.node["causal"]:
            return keys
        back = b.op("Mul", b.op("Sub", row, column), self.ints(block))
        inside = np.arange(block)
        distance = b.op("Add", b.op("Unsqueeze", back, self.ints(3, 4)), b.constant(inside[:, None] - inside, np.int64))
        return b.op("And", keys, b.op("GreaterOrEqual", distance, b.constant(0, np.int64)))

    def _largest(self, places: ir.Value, peaks: ir.Value) -> ir.Value:
        """Return the largest logit of each query over the chosen blocks of its row, ``[B, H, N, b]``."""
        b = self.b
        every = b.op("Mul", self.count, self.count)
        leading = b.op("Shape", peaks, start=0, end=2)
        shape = b.op("Concat", leading, every, self.ints(self.block), axis=0)
        nothing = b.op("Expand", lowest(b, self.node["q"]), shape)
        where = b.op("Expand", b.op("Unsqueeze", places, self.ints(-1)), b.op("Shape", peaks))
        dense = b.op("ScatterElements", nothing, where, peaks, axis=2)
        apart = b.reshape(dense, 0, 0, self.count, self.count, self.block)
        return b.op("ReduceMax", apart, self.ints(3), keepdims=0)

    def _taken(self, x: ir.Value, at: ir.Value, first: int, second: int) -> ir.Value:
        """Gather matrices ``[..., first, second]`` of a tensor by their number, ``[B, H, m, first, second]``."""
        flat = self.b.reshape(x, -1, first * second)
        return self.b.reshape(self.b.op("Gather", flat, at, axis=0), 0, 0, 0, first, second)

    def _of_bias(self, places: ir.Value) -> ir.Value:
        """Return the number of each chosen block in the bias, whose batch or heads may be one."""
        b, (batch, heads) = self.b, self.node.shape("bias")[:2]
        every = b.op("Mul", self.count, self.count)
        at = places
        if heads != 1:
            each = b.constant(np.arange(self.heads).reshape(1, -1, 1), np.int64)
            at = b.op("Add", at, b.op("Mul", each, every))
        if batch != 1:
            items = b.op("Mul", b.reshape(self._numbers(1), -1, 1, 1), self.ints(1 if heads == 1 else self.heads))
            at = b.op("Add", at, b.op("Mul", items, every))
        return at

    def _numbers(self, each: int) -> ir.Value:
        """Return 0, 1, ... for ``each`` of every item of the batch."""
        b = self.b
        end = b.op("Squeeze", b.op("Mul", b.size(self.node["q"], 0), self.ints(each)))
        return b.op("Range", b.constant(0, np.int64), end, b.constant(1, np.int64))

    def _across(self, x: ir.Value) -> ir.Value:
        """Turn a value of each block of queries ``[B, 1, N, 1]`` into one of each block of keys."""
        return self.b.op("Transpose", x, perm=[0, 1, 3, 2])
