"""What the ONNX forms of recurrent operators share: ``kernels/chunks.py``, with sizes that are known at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_form import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["from_chunks", "heads_in_chunks", "product_with_transposed", "running_sum", "states", "zeros_like_state"]


def heads_in_chunks(b: Builder, value: ir.Value, heads: int, depth: int) -> ir.Value:
    """Turn ``[B, T, heads * depth]`` into ``[B, heads, N, CHUNK, depth]``, the last chunk filled with zeros."""
    missing = b.op("Mod", b.op("Neg", b.size(value, 1)), b.constant([CHUNK], np.int64))
    before = b.constant([0, 0, 0, 0], np.int64)
    padded = b.op("Pad", value, b.op("Concat", before, missing, b.constant([0], np.int64), axis=0))
    apart = b.op("Transpose", b.reshape(padded, 0, -1, CHUNK, heads, depth), perm=[0, 3, 1, 2, 4])
    apart.type = value.type
    return apart


def from_chunks(b: Builder, value: ir.Value, like: ir.Value, width: int) -> ir.Value:
    """Turn ``[B, H, N, CHUNK, E]`` into ``[B, T, width]`` with the T of ``like``."""
    tokens = b.reshape(b.op("Transpose", value, perm=[0, 2, 3, 1, 4]), 0, -1, width)
    return b.op("Slice", tokens, b.constant([0], np.int64), b.size(like, 1), b.constant([1], np.int64))


def product_with_transposed(b: Builder, left: ir.Value, right: ir.Value) -> ir.Value:
    """Return ``left right^T`` over the last two of five axes."""
    return b.op("MatMul", left, b.op("Transpose", right, perm=[0, 1, 2, 4, 3]))


def running_sum(b: Builder, value: ir.Value, axis: int, *, exclusive: bool = False) -> ir.Value:
    """Return the sum up to each place along an axis, the place itself included or not."""
    return b.op("CumSum", value, b.constant(axis, np.int64), exclusive=int(exclusive))


def zeros_like_state(b: Builder, added: ir.Value) -> ir.Value:
    """Return zeros ``[B, H, D, E]`` for ``added [B, H, N, D, E]``."""
    shape = b.op("Shape", added)
    parts = (b.op("Slice", shape, *(b.constant([at], np.int64) for at in ends)) for ends in ((0, 2), (3, 5)))
    zeros = b.op("Expand", b.scalar(0.0, added), b.op("Concat", *parts, axis=0))
    zeros.type = added.type
    return zeros


def states(b: Builder, added: ir.Value, decay: ir.Value) -> ir.Value:
    """Return the state before each chunk, one step of a Scan for each chunk.

    ``added [B, H, N, D, E]``, ``decay [B, H, N, D or 1, 1]``, both with types; see ``xformopt.kernels.chunks.states``.
    """

    def step(
        inner: Builder, state: Sequence[ir.Value], item: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        return [inner.op("Add", inner.op("Mul", item[1], state[0]), item[0])], [state[0]]

    _, (before,) = b.scan(step, [zeros_like_state(b, added)], [added, decay], axis=2)
    return before
