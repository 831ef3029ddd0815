"""ONNX forms of ``xf.block_sparse_attention``.

The mask is constant, so which blocks meet is known when the graph is written: a row of blocks of queries is multiplied
with the blocks of keys that it keeps, gathered side by side.  Rows that keep about as many are one batched product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, Verdict, XfNode
from xformopt.kernels.onnx_softmax import hide

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

# rows are one product while it computes at most this much more than the blocks they keep
_WASTE = 1.25
# where the keys stand that only fill up a row
_NOWHERE = 1 << 40


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

    def rows(self) -> list[np.ndarray]:
        """Return, for each row of all masks, the columns it keeps."""
        return [np.flatnonzero(row) for row in self.kept.reshape(-1, self.kept.shape[2])]

    def groups(self) -> list[np.ndarray]:
        """Return the rows that are computed together; they keep a block at least."""
        counts = np.array([len(columns) for columns in self.rows()])
        used = np.flatnonzero(counts)
        if not len(used) or counts.max() * len(used) <= _WASTE * counts.sum():
            return [used] if len(used) else []
        power = np.ceil(np.log2(np.maximum(counts, 1)))
        return [used[power[used] == level] for level in np.unique(power[used])]

    def column_table(self, rows: np.ndarray) -> np.ndarray:
        """Return the columns of some rows side by side ``[R, K]``, -1 where a row has fewer."""
        kept = self.rows()
        most = max(len(kept[row]) for row in rows)
        return np.stack([np.pad(kept[row], (0, most - len(kept[row])), constant_values=-1) for row in rows])


def gathered(b: Builder, node: XfNode) -> ir.Value:
    """Only the blocks that are kept, gathered for each row of blocks."""
    blocks = _blocks(node)
    heads, q, width = node["heads"], node["q"], node.size("v", -1)
    rows, columns = blocks.kept.shape[1:]
    groups = blocks.groups()
    if not groups:
        shape = b.op("Concat", b.op("Shape", q, start=0, end=2), b.constant([width], np.int64), axis=0)
        return b.op("Expand", b.scalar(0.0, q), shape)
    scaled = b.op("Mul", q, b.scalar(node["scale"], q))
    queries = _in_blocks(b, node, blocks, scaled, "q", rows)
    keys, values = (_in_blocks(b, node, blocks, node[name], name, columns) for name in ("k", "v"))
    parts = [_attend(b, node, blocks, group, queries, keys, values) for group in groups]
    attended = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=2)
    attended = _in_order(b, attended, np.concatenate(groups), rows * len(blocks.kept))
    apart = b.reshape(attended, 0, heads, rows, blocks.size, width // heads)
    tokens = b.reshape(b.op("Transpose", apart, perm=[0, 2, 3, 1, 4]), 0, -1, width)
    return b.op("Slice", tokens, b.constant([0], np.int64), b.size(q, 1), b.constant([1], np.int64))


def _is_fixed(node: XfNode) -> Verdict:
    mask = node["block_mask"]
    is_constant = mask is not None and mask.const_value is not None
    return None if is_constant else "its block mask is computed at run time, and which blocks to gather must be known"


FORMS = (Form("gathered", gathered, _is_fixed, is_standard=True),)


def _blocks(node: XfNode) -> _Blocks:
    """Return the blocks that hold a token and, where causal, a key that is not after every query."""
    kept, size = np.asarray(node["block_mask"].const_value.numpy(), dtype=bool), node["block"]
    for axis, name in ((1, "q"), (2, "k")):
        length = node.shape(name)[1]
        if isinstance(length, int):
            kept = kept.take(range(-(-length // size)), axis)
    return _Blocks(np.tril(kept) if node["causal"] else kept, size)


def _in_blocks(b: Builder, node: XfNode, blocks: _Blocks, x: ir.Value, name: str, count: int) -> ir.Value:
    """Turn ``[B, T, H * D]`` into ``[B, H, count, block, D]``, or ``[B, 1, H * count, block, D]`` by heads."""
    heads = node["heads"]
    depth = node.size(name, -1) // heads
    missing = b.op("Sub", b.constant([count * blocks.size], np.int64), b.size(node[name], 1))
    pads = b.op("Concat", b.constant([0, 0, 0, 0], np.int64), missing, b.constant([0], np.int64), axis=0)
    cut = b.reshape(b.op("Pad", x, pads), 0, count, blocks.size, heads, depth)
    apart = b.op("Transpose", cut, perm=[0, 3, 1, 2, 4])
    return apart if blocks.is_shared else b.reshape(apart, 0, 1, heads * count, blocks.size, depth)


def _attend(
    b: Builder, node: XfNode, blocks: _Blocks, group: np.ndarray, queries: ir.Value, keys: ir.Value, values: ir.Value
) -> ir.Value:
    """Return what some rows attend to, ``[B, G, R, block, E]``."""
    rows, columns = blocks.kept.shape[1:]
    table = blocks.column_table(group)  # [R, K]
    places = np.where(table < 0, 0, table + (group // rows * columns)[:, None])
    index = b.constant(places, np.int64)
    beside = table.shape[1] * blocks.size
    depth, width = (node.size(name, -1) // node["heads"] for name in ("k", "v"))
    if len(group) < rows * len(blocks.kept):
        queries = b.op("Gather", queries, b.constant(group, np.int64), axis=2)
    leading = (0, 0, len(group), beside)
    k = b.reshape(b.op("Gather", keys, index, axis=2), *leading, depth)
    v = b.reshape(b.op("Gather", values, index, axis=2), *leading, width)
    logits = b.op("MatMul", queries, b.op("Transpose", k, perm=[0, 1, 2, 4, 3]))  # [B, G, R, block, K * block]
    visible = _visible(b, node, blocks, group, table)
    if visible is None:
        return b.op("MatMul", b.op("Softmax", logits, axis=-1), v)
    attended = b.op("MatMul", b.op("Softmax", hide(b, logits, visible, node["q"]), axis=-1), v)
    if node["key_mask"] is None and isinstance(node.shape("k")[1], int):
        # each block that is kept holds a key, and where causal the first key of the query's own block is visible
        return attended
    seen = b.op("Cast", visible, to=int(node["q"].dtype))
    return b.op("Mul", attended, b.op("ReduceMax", seen, b.constant([-1], np.int64), keepdims=1))


def _visible(b: Builder, node: XfNode, blocks: _Blocks, group: np.ndarray, table: np.ndarray) -> ir.Value | None:
    """Return which gathered keys count, ``[1 or B, 1, R, 1 or block, K * block]``, or None for all."""
    length, (rows, columns) = node.shape("k")[1], blocks.kept.shape[1:]
    inside = np.arange(blocks.size)
    at = np.where(table[..., None] < 0, _NOWHERE, table[..., None] * blocks.size + inside)  # [R, K, block]
    places = at.reshape(1, 1, len(group), 1, -1)
    visible: list[ir.Value] = []
    if node["key_mask"] is not None:
        missing = b.op("Sub", b.constant([columns * blocks.size], np.int64), b.size(node["k"], 1))
        pads = b.op("Concat", b.constant([0, 0, 0], np.int64), missing, axis=0)
        exists = b.reshape(b.op("Pad", b.op("Cast", node["key_mask"], to=_UINT8), pads), 0, columns, blocks.size)
        found = b.op("Gather", exists, b.constant(np.maximum(table, 0), np.int64), axis=1)
        visible.append(b.op("Cast", b.reshape(found, 0, 1, len(group), 1, places.shape[-1]), to=_BOOL))
    if (table < 0).any() or not isinstance(length, int) or length % blocks.size:
        visible.append(b.op("Less", b.constant(places, np.int64), b.size(node["k"], 1)))
    if node["causal"]:
        queries = ((group % rows)[:, None] * blocks.size + inside).reshape(1, 1, len(group), -1, 1)
        visible.append(b.op("LessOrEqual", b.constant(places, np.int64), b.constant(queries, np.int64)))
    if not visible:
        return None
    both = visible[0]
    for further in visible[1:]:
        both = b.op("And", both, further)
    return both


def _in_order(b: Builder, attended: ir.Value, rows: np.ndarray, count: int) -> ir.Value:
    """Bring rows ``[B, G, R, block, E]`` to their places among ``count``; the others are zeros."""
    if np.array_equal(rows, np.arange(count)):
        return attended
    places = np.full(count, len(rows))
    places[rows] = np.arange(len(rows))
    if len(rows) < count:
        attended = b.op("Pad", attended, b.constant([0] * 7 + [1, 0, 0], np.int64))
    return b.op("Gather", attended, b.constant(places, np.int64), axis=2)


_BOOL, _UINT8 = 9, 2  # TensorProto.BOOL, TensorProto.UINT8
