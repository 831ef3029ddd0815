"""What the ONNX forms of recurrent operators share: ``kernels/chunks.py``, with sizes that are known at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_form import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["first_state", "from_chunks", "heads_in_chunks", "product_with_transposed", "running_sum", "states"]


def heads_in_chunks(b: Builder, value: ir.Value, heads: int, depth: int, chunk: int = CHUNK) -> ir.Value:
    """Turn ``[B, T, heads * depth]`` into ``[B, heads, N, chunk, depth]``, the last chunk filled with zeros."""
    missing = b.op("Mod", b.op("Neg", b.size(value, 1)), b.constant([chunk], np.int64))
    before = b.constant([0, 0, 0, 0], np.int64)
    padded = b.op("Pad", value, b.op("Concat", before, missing, b.constant([0], np.int64), axis=0))
    apart = b.op("Transpose", b.reshape(padded, 0, -1, chunk, heads, depth), perm=[0, 3, 1, 2, 4])
    apart.type = value.type
    return apart


def from_chunks(b: Builder, value: ir.Value, like: ir.Value, width: int) -> ir.Value:
    """Turn ``[B, H, N, chunk, E]`` into ``[B, T, width]`` with the T of ``like``."""
    tokens = b.reshape(b.op("Transpose", value, perm=[0, 2, 3, 1, 4]), 0, -1, width)
    return b.op("Slice", tokens, b.constant([0], np.int64), b.size(like, 1), b.constant([1], np.int64))


def product_with_transposed(b: Builder, left: ir.Value, right: ir.Value) -> ir.Value:
    """Return ``left right^T`` over the last two of five axes."""
    return b.op("MatMul", left, b.op("Transpose", right, perm=[0, 1, 2, 4, 3]))


def running_sum(b: Builder, value: ir.Value, axis: int, *, exclusive: bool = False) -> ir.Value:
    """Return the sum up to each place along an axis, the place itself included or not."""
    return b.op("CumSum", value, b.constant(axis, np.int64), exclusive=int(exclusive))


def first_state(b: Builder, like: ir.Value, *sizes: int) -> ir.Value:
    """Return zeros ``[B, sizes...]`` with the batch and the type of ``like``: the state before the first token."""
    shape = b.op("Concat", b.op("Shape", like, start=0, end=1), b.constant(sizes, np.int64), axis=0)
    zeros = b.op("Expand", b.scalar(0.0, like), shape)
    zeros.type = like.type
    return zeros


def states(b: Builder, added: ir.Value, decay: ir.Value, *sizes: int) -> ir.Value:
    """Return the state before each chunk, one step of a Scan for each chunk.

    ``added [B, H, N, D, E]``, ``decay [B, H, N, D or 1, 1]``, both with types; ``sizes`` are H, D and E.
    """

    def step(
        inner: Builder, state: Sequence[ir.Value], item: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        return [inner.op("Add", inner.op("Mul", item[1], state[0]), item[0])], [state[0]]

    _, (before,) = b.scan(step, [first_state(b, added, *sizes)], [added, decay], axis=2)
    return before
