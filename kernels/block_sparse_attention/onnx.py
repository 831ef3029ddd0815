"""ONNX forms of ``xf.block_sparse_attention``.

The mask is constant, so which blocks meet is known when the graph is written: a row of blocks of queries is multiplied
with the blocks of keys that it keeps, gathered side by side.  Rows that keep about as many are one batched product.
Where the length varies, only the rows and columns that hold a token are computed: how many each product has is looked
up by the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, Verdict, XfNode
from xformopt.kernels.onnx_softmax import bounded, hide

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# rows are one product while it computes at most this much more than the blocks they keep
_WASTE = 1.25
# where the keys stand that only fill up a row
_NOWHERE = 1 << 40
_BOOL, _UINT8 = 9, 2  # TensorProto.BOOL, TensorProto.UINT8


def gathered(b: Builder, node: XfNode) -> ir.Value:
    """Only the blocks that are kept, gathered for each row of blocks."""
    blocks, rows, columns = _used(b, node)
    heads, q, width = node["heads"], node["q"], node.size("v", -1)
    if not blocks.groups:
        shape = b.op("Concat", b.op("Shape", q, start=0, end=2), b.constant([width], np.int64), axis=0)
        return b.op("Expand", b.scalar(0.0, q), shape)
    writer = _Writer(b, node, blocks, rows, columns)
    scaled = b.op("Mul", q, b.scalar(node["scale"], q))
    queries = writer.in_blocks(scaled, "q", rows)
    keys, values = (writer.in_blocks(node[name], name, columns) for name in ("k", "v"))
    bias = writer.bias_in_blocks()
    attended = writer.in_order([writer.attend(group, queries, keys, values, bias) for group in blocks.groups])
    apart = b.reshape(attended, 0, heads, rows.as_tensor(b), blocks.size, width // heads)
    tokens = b.reshape(b.op("Transpose", apart, perm=[0, 2, 3, 1, 4]), 0, -1, width)
    return b.op("Slice", tokens, b.constant([0], np.int64), b.size(q, 1), b.constant([1], np.int64))


def _is_fixed(node: XfNode) -> Verdict:
    mask = node["block_mask"]
    is_constant = mask is not None and mask.const_value is not None
    return None if is_constant else "its block mask is computed at run time, and which blocks to gather must be known"


FORMS = (Form("gathered", gathered, _is_fixed, is_standard=True),)


def _used(b: Builder, node: XfNode) -> tuple[_Blocks, _Count, _Count]:
    """Return the blocks that can hold a token and, where causal, a key not after every query; and how many are used."""
    kept, size = np.asarray(node["block_mask"].const_value.numpy(), dtype=bool), node["block"]
    counts = []
    for axis, name in ((1, "q"), (2, "k")):
        length = node.shape(name)[1]
        if isinstance(length, int):
            kept = kept.take(range(-(-length // size)), axis)
            counts.append(_Count(kept.shape[axis]))
        else:
            up = b.op("Add", b.size(node[name], 1), b.constant([size - 1], np.int64))
            counts.append(_Count(kept.shape[axis], b.op("Div", up, b.constant([size], np.int64))))
    return _Blocks(np.tril(kept) if node["causal"] else kept, size), counts[0], counts[1]


@dataclass(frozen=True)
class _Group:
    """Rows of blocks that are computed together, those of the first queries first.

    Attributes:
        heads: The mask of each row, ``[R]``.
        rows: Its place in that mask, ``[R]``, ascending.
        table: The columns each keeps side by side, ascending, ``[R, K]``; -1 where a row has fewer.

    """

    heads: np.ndarray
    rows: np.ndarray
    table: np.ndarray

    def rows_by(self, count: int) -> np.ndarray:
        """Return how many rows lie among the first n, for n up to ``count``."""
        return np.searchsorted(self.rows, np.arange(count + 1), side="left")

    def columns_by(self, rows: int, columns: int) -> np.ndarray:
        """Return how wide the table is for the first n rows and m columns, ``[rows + 1, columns + 1]``; at least 1."""
        kept = np.zeros((rows + 1, columns + 1), np.int64)
        for row, found in zip(self.rows, self.table, strict=True):
            at_most = np.searchsorted(found[found >= 0], np.arange(columns + 1), side="left")
            kept[row + 1] = np.maximum(kept[row + 1], at_most)
        return np.maximum(np.maximum.accumulate(kept, 0), 1)


@dataclass(frozen=True)
class _Blocks:
    """Which blocks meet, and how heads, rows and columns are numbered.

    Attributes:
        kept: ``[G, N, M]`` bool; G is the number of heads, or 1 where all have one mask.
        size: Tokens of a block.

    """

    kept: np.ndarray
    size: int

    @property
    def is_shared(self) -> bool:
        """Whether all heads have one mask: they are part of the batch then, and else of the rows."""
        return len(self.kept) == 1

    @cached_property
    def groups(self) -> list[_Group]:
        """The rows that are computed together; they keep a block at least."""
        counts = self.kept.sum(2)  # [G, N]
        row, head = np.nonzero(counts.T)
        counts = counts[head, row]
        if not len(counts):
            return []
        if counts.max() * len(counts) <= _WASTE * counts.sum():
            return [self._group(head, row)]
        power = np.ceil(np.log2(counts))
        return [self._group(head[power == level], row[power == level]) for level in np.unique(power)]

    def _group(self, heads: np.ndarray, rows: np.ndarray) -> _Group:
        kept = [np.flatnonzero(self.kept[head, row]) for head, row in zip(heads, rows, strict=True)]
        most = max(map(len, kept))
        table = np.stack([np.pad(row, (0, most - len(row)), constant_values=-1) for row in kept])
        return _Group(heads, rows, table)


@dataclass(frozen=True)
class _Count:
    """How many blocks one axis has: known when the graph is written, or at run time."""

    most: int
    value: ir.Value | None = None

    def pick(self, b: Builder, table: np.ndarray) -> ir.Value:
        """Return the entry of a table ``[most + 1, ...]`` for this many blocks."""
        if self.value is None:
            return b.constant(table[self.most], np.int64)
        return b.op("Gather", b.constant(table, np.int64), b.op("Squeeze", self.value), axis=0)

    def as_tensor(self, b: Builder) -> ir.Value:
        """Return it as a tensor of one element."""
        return b.constant([self.most], np.int64) if self.value is None else self.value


@dataclass(frozen=True)
class _Writer:
    """Writes one node: the graph's builder, the node, its blocks and how many of them are used."""

    b: Builder
    node: XfNode
    blocks: _Blocks
    rows: _Count
    columns: _Count

    def in_blocks(self, x: ir.Value, name: str, count: _Count) -> ir.Value:
        """Turn ``[B, T, H * D]`` into ``[B, H, count, block, D]``, or ``[B, 1, H * count, block, D]`` by heads."""
        b, heads = self.b, self.node["heads"]
        depth = self.node.size(name, -1) // heads
        missing = self._missing(name, count)
        pads = b.op("Concat", b.constant([0, 0, 0, 0], np.int64), missing, b.constant([0], np.int64), axis=0)
        cut = b.reshape(b.op("Pad", x, pads), 0, -1, self.blocks.size, heads, depth)
        apart = b.op("Transpose", cut, perm=[0, 3, 1, 2, 4])
        return apart if self.blocks.is_shared else b.reshape(apart, 0, 1, -1, self.blocks.size, depth)

    def bias_in_blocks(self) -> ir.Value | None:
        """Turn the bias into ``[., H, N * M, block, block]``, or ``[., 1, H * N * M, block, block]`` by heads."""
        b, node, size = self.b, self.node, self.blocks.size
        if node["bias"] is None:
            return None
        missing = (self._missing("q", self.rows), self._missing("k", self.columns))
        pads = b.op("Concat", b.constant([0] * 6, np.int64), *missing, axis=0)
        bias = b.op("Pad", bounded(b, node["bias"], node["q"]), pads)
        heads = node.shape("bias")[1]
        if not self.blocks.is_shared and heads == 1:
            every = b.constant([1, len(self.blocks.kept), 1, 1], np.int64)
            bias, heads = b.op("Expand", bias, every), len(self.blocks.kept)
        assert isinstance(heads, int)
        cut = b.reshape(bias, 0, heads, self.rows.as_tensor(b), size, self.columns.as_tensor(b), size)
        apart = b.op("Transpose", cut, perm=[0, 1, 2, 4, 3, 5])
        return b.reshape(apart, 0, heads if self.blocks.is_shared else 1, -1, size, size)

    def attend(
        self, group: _Group, queries: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value | None
    ) -> ir.Value:
        """Return what some rows attend to, ``[B, G, R, block, E]``."""
        b, node, size = self.b, self.node, self.blocks.size
        depth, width = (node.size(name, -1) // node["heads"] for name in ("k", "v"))
        last = b.constant([1], np.int64)
        row = self._first(group, group.rows)
        if self.rows.value is not None:
            # of a group without any row that holds tokens, one is computed all the same
            row = b.op("Min", row, b.op("Sub", self.rows.as_tensor(b), last))
        head = self._first(group, group.heads)
        column = self._first(group, np.maximum(group.table, 0), by_column=True)  # [R, K]
        place, query = column, row
        if not self.blocks.is_shared:
            query = b.op("Add", row, b.op("Mul", head, self.rows.as_tensor(b)))
        if self.rows.value is not None or not self._holds_all_in_order(group):
            queries = b.op("Gather", queries, query, axis=2)
        if self.columns.value is not None:
            place = b.op("Min", column, b.op("Sub", self.columns.as_tensor(b), last))
        inside = place
        if not self.blocks.is_shared:
            first = b.op("Unsqueeze", b.op("Mul", head, self.columns.as_tensor(b)), last)
            place = b.op("Add", place, first)
        k = b.reshape(b.op("Gather", keys, place, axis=2), 0, 0, 0, -1, depth)
        v = b.reshape(b.op("Gather", values, place, axis=2), 0, 0, 0, -1, width)
        logits = b.op("MatMul", queries, b.op("Transpose", k, perm=[0, 1, 2, 4, 3]))  # [B, G, R, block, K * block]
        if bias is not None:
            cell = b.op("Add", b.op("Unsqueeze", b.op("Mul", query, self.columns.as_tensor(b)), last), inside)
            beside = b.op("Transpose", b.op("Gather", bias, cell, axis=2), perm=[0, 1, 2, 4, 3, 5])
            logits = b.op("Add", logits, b.reshape(beside, 0, 0, 0, size, -1))
        visible = self._visible(group, inside)
        if visible is None:
            return b.op("MatMul", b.op("Softmax", logits, axis=-1), v)
        attended = b.op("MatMul", b.op("Softmax", hide(b, logits, visible, node["q"]), axis=-1), v)
        if node["key_mask"] is None and self.columns.value is None:
            # each block that is kept holds a key, and where causal the first key of the query's own block is visible
            return attended
        seen = b.op("Cast", visible, to=int(node["q"].dtype))
        return b.op("Mul", attended, b.op("ReduceMax", seen, b.constant([-1], np.int64), keepdims=1))

    def in_order(self, attended: list[ir.Value]) -> ir.Value:
        """Bring the rows of all groups ``[B, G, R, block, E]`` to their places; those of no group are zeros."""
        b, groups = self.b, self.blocks.groups
        together = attended[0] if len(attended) == 1 else b.op("Concat", *attended, axis=2)
        masks, rows = self.blocks.kept.shape[:2]
        # where a row is found: its group, and its place there
        of, rank = np.full((masks, rows), len(groups)), np.zeros((masks, rows), np.int64)
        for number, group in enumerate(groups):
            of[group.heads, group.rows], rank[group.heads, group.rows] = number, np.arange(len(group.rows))
        sizes = np.stack([self._rows_of(group) for group in groups], 1)  # [rows + 1, groups]
        starts = np.pad(np.cumsum(sizes, 1), ((0, 0), (1, 0)))  # [rows + 1, groups + 1]
        if (of == len(groups)).any():
            together = b.op("Pad", together, b.constant([0] * 7 + [1, 0, 0], np.int64))
        if self.rows.value is None:
            places = (starts[-1][of] + rank).reshape(-1)
            if np.array_equal(places, np.arange(len(places))):
                return together
            return b.op("Gather", together, b.constant(places, np.int64), axis=2)
        begin, end = b.constant([0], np.int64), self.rows.as_tensor(b)
        found = [b.op("Slice", b.constant(x, np.int64), begin, end, b.constant([1], np.int64)) for x in (of, rank)]
        start = b.op("Gather", self.rows.pick(b, starts), found[0], axis=0)
        return b.op("Gather", together, b.reshape(b.op("Add", start, found[1]), -1), axis=2)

    def _missing(self, name: str, count: _Count) -> ir.Value:
        whole = self.b.op("Mul", count.as_tensor(self.b), self.b.constant([self.blocks.size], np.int64))
        return self.b.op("Sub", whole, self.b.size(self.node[name], 1))

    def _holds_all_in_order(self, group: _Group) -> bool:
        masks, rows = self.blocks.kept.shape[:2]
        return np.array_equal(group.heads * rows + group.rows, np.arange(masks * rows))

    def _rows_of(self, group: _Group) -> np.ndarray:
        """Return how many rows of a group are computed, by how many there are; one at least: nothing is empty."""
        rows: np.ndarray = np.maximum(group.rows_by(self.rows.most), 1)
        return rows

    def _first(self, group: _Group, table: np.ndarray, *, by_column: bool = False) -> ir.Value:
        """Return the part of a table ``[R, ...]`` or ``[R, K, ...]`` of a group that holds tokens."""
        b, value = self.b, self.b.constant(table, np.int64)
        zero, one = b.constant([0], np.int64), b.constant([1], np.int64)
        if self.rows.value is not None:
            end = b.reshape(self.rows.pick(b, self._rows_of(group)), 1)
            value = b.op("Slice", value, zero, end, zero)
        if by_column and (self.rows.value is not None or self.columns.value is not None):
            widths = group.columns_by(self.rows.most, self.columns.most)
            width = self.rows.pick(b, widths)
            at = b.op("Squeeze", self.columns.as_tensor(b))
            value = b.op("Slice", value, zero, b.reshape(b.op("Gather", width, at, axis=0), 1), one)
        return value

    def _visible(self, group: _Group, inside: ir.Value) -> ir.Value | None:
        """Return which gathered keys count, ``[1 or B, 1, R, 1 or block, K * block]``, or None for all."""
        b, node, size = self.b, self.node, self.blocks.size
        length = node.shape("k")[1]
        table, steps = group.table[..., None], np.arange(size)
        at = np.where(table < 0, _NOWHERE, table * size + steps)  # [R, K, block]
        flat = b.reshape(self._first(group, at, by_column=True), 0, -1)
        places = b.op("Unsqueeze", flat, b.constant([0, 1, 3], np.int64))
        visible: list[ir.Value] = []
        if node["key_mask"] is not None:
            pads = b.op("Concat", b.constant([0, 0, 0], np.int64), self._missing("k", self.columns), axis=0)
            exists = b.reshape(b.op("Pad", b.op("Cast", node["key_mask"], to=_UINT8), pads), 0, -1, size)
            found = b.op("Gather", exists, inside, axis=1)  # [B, R, K, block]
            beside = b.op("Unsqueeze", b.reshape(found, 0, 0, -1), b.constant([1, 3], np.int64))
            visible.append(b.op("Cast", beside, to=_BOOL))
        if (group.table < 0).any() or not isinstance(length, int) or length % size:
            visible.append(b.op("Less", places, b.size(node["k"], 1)))
        if node["causal"]:
            queries = self._first(group, group.rows[:, None] * size + steps)  # [R, block]
            visible.append(b.op("LessOrEqual", places, b.op("Unsqueeze", queries, b.constant([0, 1, 4], np.int64))))
        if not visible:
            return None
        both = visible[0]
        for further in visible[1:]:
            both = b.op("And", both, further)
        return both
