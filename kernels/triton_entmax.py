"""Triton kernel of entmax attention that leaves out keys whose weights are zero, a block of them at a time.

A row's weights are ``max(s - t, 0) ** POWER`` of its scaled scores ``s`` with the threshold ``t`` at which they sum up
to one.  As in AdaSplash (Goncalves et al., arXiv 2502.12082) it is found by Halley's method inside of a bracket,
walking over the keys once a step, and values are read at the end.  The lower end of the bracket, first the largest
score less one, only rises, so a block of keys that lies below it in every row of the program never counts again: the
program keeps a list of the blocks that may.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["entmax_forward"]

# float32 products in three products of tensor cores: 22 bits instead of the 10 of one
_PRECISION = tl.constexpr("tf32x3")
# a threshold that moves by less than this, of scores whose largest is 0, is found
_FOUND = tl.constexpr(2e-7)


@triton.jit
def _scores(
    tile, k, key_mask, start, rows, T, S, k_row, factor,
    D: tl.constexpr, CAUSAL: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the scores of the keys from ``start`` on, -infinity where a query does not see a key or is none."""
    columns, widths = start + tl.arange(0, N), tl.arange(0, WIDE)
    is_key = columns < S
    here = is_key[None, :] & (widths < D)[:, None]
    keys = tl.load(k + columns[None, :] * k_row + widths[:, None], mask=here, other=0.0)
    scores = tl.dot(tile, keys, input_precision=_PRECISION) * factor
    if key_mask is not None:
        is_key = is_key & (tl.load(key_mask + columns, mask=is_key, other=0) != 0)
    visible = is_key[None, :] & (rows < T)[:, None]
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _power(x, POWER: tl.constexpr):
    """Return ``x ** POWER`` of numbers that are not negative, and 0 of 0."""
    if POWER == 0:
        return tl.where(x > 0, 1.0, 0.0)
    elif POWER == 1:
        return x
    elif POWER == 2:
        return x * x
    else:
        return tl.where(x > 0, tl.exp2(POWER * tl.log2(tl.where(x > 0, x, 1.0))), 0.0)


@triton.jit
def _append(blocks, count, block, counts):
    """Put ``block`` behind the first ``count`` of the list where it ``counts`` in any row; returns how many it has."""
    is_kept = tl.max(tl.max(counts.to(tl.int32), 1), 0)
    tl.store(blocks + count, block, mask=is_kept > 0)
    return count + is_kept


@triton.jit
def entmax_forward(
    q,
    k,
    v,
    key_mask,
    blocks,
    out,
    T,
    S,
    columns,
    scale,
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    POWER: tl.constexpr,
    STEPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
):
    """Attention of ``M`` queries of one head: programs are ``(blocks of queries, heads, sequences)``.

    Args:
        q: Queries of all heads, one row a token; rows and sequences ``q_row`` and ``q_batch`` apart.
        k: Keys alike.
        v: Values alike.
        key_mask: ``[B, S]``, zero where there is no key, contiguous; or None.
        blocks: The program's list, ``[B, HEADS, blocks of queries, columns]``, contiguous.
        out: ``[B, T, HEADS * E]``, contiguous.
        T: Queries of a sequence.
        S: Keys of a sequence.
        columns: How many blocks of keys there are.
        scale: Factor of the products; that of the scores has ``1 / POWER`` in it.
        q_batch: See ``q``.
        q_row: See ``q``.
        k_batch: See ``q``.
        k_row: See ``q``.
        v_batch: See ``q``.
        v_row: See ``q``.
        HEADS: Heads.
        D: Width of a head of queries and keys.
        E: Width of a head of values.
        CAUSAL: Whether a query sees no key behind it.
        POWER: ``1 / (alpha - 1)``, at least 1.
        STEPS: At most so many steps.
        M: Queries of a block.
        N: Keys of a block.
        WIDE_D: ``D`` rounded up to a power of two, at least 16.
        WIDE_E: The same of ``E``.

    """
    # the last queries see the most keys where attention is causal: they go first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    widths, depths = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    is_row = rows < T
    place = q + batch * q_batch + head * D + rows[:, None] * q_row + widths[None, :]
    tile = tl.load(place, mask=is_row[:, None] & (widths < D)[None, :], other=0.0)
    k += batch * k_batch + head * D
    v += batch * v_batch + head * E
    if key_mask is not None:
        key_mask += batch * S
    blocks += ((batch * HEADS + head) * tl.num_programs(0) + block) * columns
    factor = tl.cast(scale, tl.float32)
    last = columns
    if CAUSAL:
        last = tl.minimum(columns, ((block + 1) * M + N - 1) // N)
    peak = tl.full([M], float("-inf"), tl.float32)
    count = 0
    for column in range(0, last):
        scores = _scores(tile, k, key_mask, column * N, rows, T, S, k_row, factor, D, CAUSAL, N, WIDE_D)
        peak = tl.maximum(peak, tl.max(scores, 1))
        count = _append(blocks, count, column, scores > (peak - 1.0)[:, None])
    # what one thread wrote of the list, all of them read
    tl.debug_barrier()
    # of a query that sees no key, any finite number keeps the differences from being NaN
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    low = tl.full([M], -1.0, tl.float32)
    high = low * 0.0 - tl.exp2(-tl.log2(tl.cast(S, tl.float32)) / POWER)
    t = low
    step, is_moving = 0, 1
    while (step < STEPS) & (is_moving > 0):
        total = tl.full([M], -1.0, tl.float32)
        slope = tl.zeros([M], tl.float32)
        bend = tl.zeros([M], tl.float32)
        kept = 0
        for number in range(0, count):
            kept_block = tl.load(blocks + number)
            scores = _scores(tile, k, key_mask, kept_block * N, rows, T, S, k_row, factor, D, CAUSAL, N, WIDE_D)
            scores -= peak[:, None]
            above = tl.maximum(scores - t[:, None], 0.0)
            total += tl.sum(_power(above, POWER), 1)
            slope -= POWER * tl.sum(_power(above, POWER - 1), 1)
            if POWER != 1:
                bend += POWER * (POWER - 1) * tl.sum(_power(above, POWER - 2), 1)
            kept = _append(blocks, kept, kept_block, scores > low[:, None])
        tl.debug_barrier()
        count = kept
        low, high = tl.where(total > 0, t, low), tl.where(total > 0, high, t)
        below = 2.0 * slope * slope - total * bend
        halley = t - 2.0 * total * slope / tl.where(below > 0, below, 1.0)
        is_inside = (below > 0) & (halley >= low) & (halley <= high)
        following = tl.where(is_inside, halley, (low + high) * 0.5)
        is_moving = tl.max((tl.abs(following - t) > _FOUND).to(tl.int32), 0)
        t = following
        step += 1
    whole = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE_E], tl.float32)
    for number in range(0, count):
        kept_block = tl.load(blocks + number)
        scores = _scores(tile, k, key_mask, kept_block * N, rows, T, S, k_row, factor, D, CAUSAL, N, WIDE_D)
        weights = _power(tl.maximum(scores - (peak + t)[:, None], 0.0), POWER)
        whole += tl.sum(weights, 1)
        if tl.max(tl.max(weights, 1), 0) > 0:
            keys = kept_block * N + tl.arange(0, N)
            here = (keys < S)[:, None] & (depths < E)[None, :]
            values = tl.load(v + keys[:, None] * v_row + depths[None, :], mask=here, other=0.0)
            sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=_PRECISION)
    # a query that sees no key gets zeros
    attended = sums / tl.where(whole > 0, whole, 1.0)[:, None]
    place = out + (batch * T + rows[:, None]) * (HEADS * E) + head * E + depths[None, :]
    tl.store(place, attended.to(out.dtype.element_ty), mask=is_row[:, None] & (depths < E)[None, :])
