"""Triton kernel of attention over the blocks that a mask allows: other blocks are neither read nor computed."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from xformopt.kernels.triton_attention import walk

__all__ = ["block_sparse_forward"]


@triton.jit
def block_sparse_forward(
    q,
    k,
    v,
    block_mask,
    key_mask,
    bias,
    out,
    T,
    S,
    scale,
    columns,
    mask_head,
    mask_row,
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    RIGHT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
):
    """Attention of one block of ``M`` queries of one head: programs are ``(blocks, heads, sequences)``.

    Args:
        q: Queries of all heads, one row a token; rows and sequences ``q_row`` and ``q_batch`` apart.
        k: Keys alike.
        v: Values alike.
        block_mask: Zero where a block of queries does not see a block of keys; heads ``mask_head`` apart (0 where all
            share it), rows ``mask_row``, columns adjacent.
        key_mask: ``[B, S]``, zero where there is no key, contiguous; or None.
        bias: Added to the scaled logits, with the strides ``bias_*`` (0 where it is broadcast); or None.
        out: ``[B, T, HEADS * E]``, contiguous.
        T: Queries of a sequence.
        S: Keys of a sequence.
        scale: Factor of the logits.
        columns: How many blocks of keys there are.
        mask_head: See ``block_mask``.
        mask_row: See ``block_mask``.
        q_batch: See ``q``.
        q_row: See ``q``.
        k_batch: See ``q``.
        k_row: See ``q``.
        v_batch: See ``q``.
        v_row: See ``q``.
        bias_batch: See ``bias``.
        bias_head: See ``bias``.
        bias_row: See ``bias``.
        bias_column: See ``bias``.
        HEADS: Heads.
        D: Width of a head of queries and keys.
        E: Width of a head of values.
        RIGHT: 0: no key behind the query is seen; -1: all are.
        M: Tokens of a block, of queries and of keys.
        N: Keys taken at once; divides ``M``.
        WIDE_D: ``D`` rounded up to a power of two, at least 16.
        WIDE_E: The same of ``E``.

    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = block * M
    rows = begin + tl.arange(0, M)
    is_row = rows < T
    widths, depths = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    place = q + batch * q_batch + head * D + rows[:, None] * q_row + widths[None, :]
    tile = tl.load(place, mask=is_row[:, None] & (widths < D)[None, :], other=0.0)
    k += batch * k_batch + head * D
    v += batch * v_batch + head * E
    if key_mask is not None:
        key_mask += batch * S
    bias_rows = bias
    if bias is not None:
        # queries behind the last one read what it reads
        last = tl.minimum(rows, T - 1).to(tl.int64)
        bias_rows = bias + batch * bias_batch + head * bias_head + last * bias_row
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE_E], tl.float32)
    for column in range(0, columns):
        low = column * M
        high = tl.minimum(low + M, S)
        if RIGHT >= 0:
            high = tl.minimum(high, begin + M)
        is_allowed = tl.load(block_mask + head * mask_head + block * mask_row + column) != 0
        # of a block that is not allowed no keys are left
        high = tl.maximum(tl.where(is_allowed, high, low), low)
        behind = high // N * N
        if RIGHT >= 0:
            behind = tl.maximum(tl.minimum(behind, (begin + 1) // N * N), low)
        peak, total, sums = walk(
            low, behind, tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, None,
            rows, S, scale, peak, total, sums, D, E, -1, RIGHT, N, WIDE_D, WIDE_E, True,
        )  # fmt: skip
        peak, total, sums = walk(
            behind, high, tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, None,
            rows, S, scale, peak, total, sums, D, E, -1, RIGHT, N, WIDE_D, WIDE_E, False,
        )  # fmt: skip
    # a query that sees no key gets zeros
    attended = sums / tl.where(total > 0, total, 1.0)[:, None]
    place = out + (batch * T + rows[:, None]) * (HEADS * E) + head * E + depths[None, :]
    tl.store(place, attended.to(out.dtype.element_ty), mask=is_row[:, None] & (depths < E)[None, :])
