"""Tiles of softmax attention in Triton, which the attention operators share.

A program takes a block of queries of one head of one sequence and walks over the keys, block after block, with the
online softmax of FlashAttention (Dao et al., arXiv 2205.14135): a running maximum and a running sum, both corrected
when the maximum grows, so that no row of logits is ever stored.  Blocks that every query of the program sees whole are
walked without comparing positions (Dao, arXiv 2307.08691).  Sequences lie ``[B, T, H * D]``, or one after another.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_forward", "decode_join", "decode_split", "online_softmax", "walk"]

_LOG2_E = tl.constexpr(1.4426950408889634)
# float32 products in three products of tensor cores: 22 bits instead of the 10 of one
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def online_softmax(logits, values, peak, total, sums, UNIT: tl.constexpr, PRECISION: tl.constexpr):
    """Take one more block of keys into a softmax: ``UNIT`` of a logit is a factor of 2, a hidden one is -infinity."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    # rows that have seen no key yet: any finite number keeps the differences from being NaN
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2((logits - safe[:, None]) * UNIT)
    shrink = tl.exp2((peak - safe) * UNIT)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision=PRECISION)
    return higher, total, sums


@triton.jit
def _locate(offsets, sequences, block, M: tl.constexpr):
    """Return the packed sequence that a block of queries belongs to, and its place among the sequence's blocks.

    Blocks are counted sequence after sequence; a block behind the last one gets ``sequences``.
    """
    found = block * 0
    before = block * 0
    reached = block * 0
    for start in range(0, sequences, 128):
        numbers = start + tl.arange(0, 128)
        is_sequence = numbers < sequences
        begins = tl.load(offsets + numbers, mask=is_sequence, other=0)
        ends = tl.load(offsets + numbers + 1, mask=is_sequence, other=0)
        blocks = ((ends - begins + M - 1) // M).to(tl.int32)
        passed = reached + tl.cumsum(blocks, 0)
        is_passed = is_sequence & (passed <= block)
        found += tl.sum(is_passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(is_passed, passed, 0), 0))
        reached += tl.sum(blocks, 0)
    return found, block - before


@triton.jit
def walk(
    low,
    high,
    tile,
    k,
    v,
    k_row,
    v_row,
    key_mask,
    bias,
    bias_column,
    log_size,
    places,
    seen,
    scale,
    peak,
    total,
    sums,
    D: tl.constexpr,
    E: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    N: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Take the keys from ``low`` to ``high`` into the softmax; ``WHOLE``: every query sees all of them by position.

    ``places`` are the queries' positions among the keys, ``bias`` the queries' rows of it; the rest as of
    :func:`attention_forward`, already at this sequence and head.
    """
    widths, depths = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    # a bias may be the lowest number there is, which has no room for a factor
    UNIT: tl.constexpr = 1.0 if bias is None else _LOG2_E
    FACTOR: tl.constexpr = _LOG2_E if bias is None else 1.0
    for start in range(low, high, N):
        columns = start + tl.arange(0, N)
        is_key = columns < seen
        key_places = k + columns[None, :] * k_row + widths[:, None]
        value_places = v + columns[:, None] * v_row + depths[None, :]
        if WHOLE and WIDE_D == D:
            key_tile = tl.load(key_places)
        else:
            key_tile = tl.load(key_places, mask=is_key[None, :] & (widths < D)[:, None], other=0.0)
        logits = tl.dot(tile, key_tile, input_precision=_PRECISION) * (tl.cast(scale, tl.float32) * FACTOR)
        if bias is not None:
            given = tl.load(bias[:, None] + columns[None, :] * bias_column, mask=is_key[None, :], other=0.0)
            logits += given.to(tl.float32)
        if log_size is not None:
            sizes = tl.load(log_size + columns, mask=is_key, other=0.0).to(tl.float32)
            logits += (sizes * FACTOR)[None, :]
        if key_mask is not None:
            exists = tl.load(key_mask + columns, mask=is_key, other=0) != 0
            logits = tl.where(exists[None, :], logits, float("-inf"))
        if not WHOLE:
            visible = is_key[None, :]
            if RIGHT >= 0:
                visible = visible & (columns[None, :] <= places[:, None] + RIGHT)
            if LEFT >= 0:
                visible = visible & (columns[None, :] >= places[:, None] - LEFT)
            logits = tl.where(visible, logits, float("-inf"))
        if WHOLE and WIDE_E == E:
            value_tile = tl.load(value_places)
        else:
            value_tile = tl.load(value_places, mask=is_key[:, None] & (depths < E)[None, :], other=0.0)
        peak, total, sums = online_softmax(logits, value_tile, peak, total, sums, UNIT, _PRECISION)
    return peak, total, sums


@triton.jit
def attention_forward(
    q,
    k,
    v,
    out,
    key_mask,
    bias,
    log_size,
    offsets,
    keys,
    T,
    S,
    sequences,
    scale,
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
):
    """Attention of ``M`` queries of one head; operands that are None are left out when it is compiled.

    Programs are ``(blocks of queries, heads, sequences)``; of packed sequences ``(blocks of all of them, heads)``.

    Args:
        q: Queries of all heads, one row a token; rows and sequences ``q_row`` and ``q_batch`` apart.
        k: Keys alike, of ``HEADS / GROUP`` heads.
        v: Values alike.
        out: Written for every query, ``[B, T, HEADS * E]``, contiguous.
        key_mask: ``[B, S]``, zero where there is no key, contiguous.
        bias: Added to the scaled logits, with the strides ``bias_*`` (0 where it is broadcast).
        log_size: Added for each key, ``[B, S]``, contiguous.
        offsets: Where packed sequences begin and end, ``[B + 1]``.
        keys: How many tokens of a packed sequence are keys, ``[B]``.
        T: Queries of a sequence.
        S: Keys of a sequence.
        sequences: How many sequences are packed.
        scale: Factor of the logits.
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
        HEADS: Query heads.
        GROUP: Query heads to a head of keys.
        D: Width of a head of queries and keys.
        E: Width of a head of values.
        LEFT: How many keys before its own position a query sees; -1: all.
        RIGHT: How many it sees after that; 0: causal; -1: all.
        PACKED: Whether sequences lie one after another.
        M: Queries of a block.
        N: Keys of a block.
        WIDE_D: ``D`` rounded up to a power of two, at least 16.
        WIDE_E: The same of ``E``.

    """
    head = tl.program_id(1)
    if PACKED:
        sequence, block = _locate(offsets, sequences, tl.program_id(0), M)
        if sequence >= sequences:
            return
        first = tl.load(offsets + sequence)
        queries = (tl.load(offsets + sequence + 1) - first).to(tl.int32)
        seen = queries
        if keys is not None:
            seen = tl.load(keys + sequence).to(tl.int32)
        shift = 0
        first = first.to(tl.int64)
        q += first * q_row
        k += first * k_row
        v += first * v_row
        out += first * (HEADS * E)
    else:
        # the last queries see the most keys where attention is causal: they go first
        block = tl.num_programs(0) - 1 - tl.program_id(0)
        batch = tl.program_id(2).to(tl.int64)
        queries, seen, shift = T, S, S - T
        q += batch * q_batch
        k += batch * k_batch
        v += batch * v_batch
        out += batch * T * (HEADS * E)
        if key_mask is not None:
            key_mask += batch * S
        if log_size is not None:
            log_size += batch * S
        if bias is not None:
            bias += batch * bias_batch + head * bias_head
    begin = block * M
    rows = begin + tl.arange(0, M)
    is_row = rows < queries
    widths, depths = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    k += head // GROUP * D
    v += head // GROUP * E
    tile = tl.load(
        q + head * D + rows[:, None] * q_row + widths[None, :], mask=is_row[:, None] & (widths < D)[None, :], other=0.0
    )
    bias_rows = bias
    if bias is not None:
        # queries behind the last one read what it reads
        bias_rows = bias + tl.minimum(rows, queries - 1).to(tl.int64) * bias_row
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, WIDE_E], tl.float32)
    # keys before `whole` and from `behind` on are hidden from some of the queries
    low, whole, behind, high = 0, 0, seen // N * N, seen
    if LEFT >= 0:
        low = tl.maximum(begin + shift - LEFT, 0) // N * N
        whole = (tl.maximum(begin + M - 1 + shift - LEFT, 0) + N - 1) // N * N
    if RIGHT >= 0:
        high = tl.minimum(seen, begin + M + shift + RIGHT)
        behind = tl.maximum(tl.minimum(seen, begin + shift + RIGHT + 1), 0) // N * N
    if LEFT >= 0:
        peak, total, sums = walk(
            low, tl.minimum(whole, high), tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, log_size,
            rows + shift, seen, scale, peak, total, sums, D, E, LEFT, RIGHT, N, WIDE_D, WIDE_E, False,
        )  # fmt: skip
    peak, total, sums = walk(
        whole, behind, tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, log_size,
        rows + shift, seen, scale, peak, total, sums, D, E, LEFT, RIGHT, N, WIDE_D, WIDE_E, True,
    )  # fmt: skip
    peak, total, sums = walk(
        tl.maximum(whole, behind), high, tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, log_size,
        rows + shift, seen, scale, peak, total, sums, D, E, LEFT, RIGHT, N, WIDE_D, WIDE_E, False,
    )  # fmt: skip
    # a query that sees no key gets zeros
    attended = sums / tl.where(total > 0, total, 1.0)[:, None]
    place = out + head * E + rows[:, None] * (HEADS * E) + depths[None, :]
    tl.store(place, attended.to(out.dtype.element_ty), mask=is_row[:, None] & (depths < E)[None, :])


@triton.jit
def decode_split(
    q,
    k,
    v,
    sums,
    totals,
    key_mask,
    bias,
    log_size,
    S,
    scale,
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
    T: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    KEYS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
):
    """Attention of few queries to ``KEYS`` of many keys; the queries of all heads that share keys are one tile.

    Programs are ``(parts of the keys, heads of keys, sequences)``.  Operands are those of :func:`attention_forward`,
    and ``sums`` ``[B, parts, HEADS, T, E]`` and ``totals`` ``[B, parts, HEADS, T, 2]``, float32: the values summed up,
    the largest logit and the sum of the weights, which :func:`decode_join` puts together.
    """
    part, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, M)
    is_row = rows < GROUP * T
    heads, queries = kv_head * GROUP + rows // T, rows % T
    widths, depths = tl.arange(0, WIDE_D), tl.arange(0, WIDE_E)
    place = q + batch * q_batch + queries[:, None] * q_row + heads[:, None] * D + widths[None, :]
    tile = tl.load(place, mask=is_row[:, None] & (widths < D)[None, :], other=0.0)
    k += batch * k_batch + kv_head * D
    v += batch * v_batch + kv_head * E
    if key_mask is not None:
        key_mask += batch * S
    if log_size is not None:
        log_size += batch * S
    bias_rows = bias
    if bias is not None:
        # rows that are none read what the first one reads
        kept = tl.where(is_row, heads, kv_head * GROUP).to(tl.int64) * bias_head
        bias_rows = bias + batch * bias_batch + kept + queries.to(tl.int64) * bias_row
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    found = tl.zeros([M, WIDE_E], tl.float32)
    low, high = part * KEYS, tl.minimum(part * KEYS + KEYS, S)
    if RIGHT >= 0:
        high = tl.minimum(high, S + RIGHT)
    if LEFT >= 0:
        low = tl.maximum(low, tl.maximum(S - T - LEFT, 0) // N * N)
    # one query at the end sees every key, but for a window
    whole = low
    if T == 1 and LEFT < 0:
        whole = high // N * N
    peak, total, found = walk(
        low, whole, tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, log_size,
        queries + S - T, S, scale, peak, total, found, D, E, LEFT, RIGHT, N, WIDE_D, WIDE_E, True,
    )  # fmt: skip
    peak, total, found = walk(
        whole, high, tile, k, v, k_row, v_row, key_mask, bias_rows, bias_column, log_size,
        queries + S - T, S, scale, peak, total, found, D, E, LEFT, RIGHT, N, WIDE_D, WIDE_E, False,
    )  # fmt: skip
    row = ((batch * tl.num_programs(0) + part) * HEADS + heads) * T + queries
    tl.store(sums + row[:, None] * E + depths[None, :], found, mask=is_row[:, None] & (depths < E)[None, :])
    tl.store(totals + row * 2, peak, mask=is_row)
    tl.store(totals + row * 2 + 1, total, mask=is_row)


@triton.jit
def decode_join(
    sums,
    totals,
    out,
    parts,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE_E: tl.constexpr,
):
    """Put the parts of one query of one head together, in order; operands are those of :func:`decode_split`."""
    UNIT: tl.constexpr = _LOG2_E if HAS_BIAS else 1.0
    query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    depths = tl.arange(0, WIDE_E)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    found = tl.zeros([WIDE_E], tl.float32)
    for part in range(0, parts):
        row = ((batch * parts + part) * HEADS + head) * T + query
        own = tl.load(totals + row * 2)
        higher = tl.maximum(peak, own)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, factor = tl.exp2((peak - safe) * UNIT), tl.exp2((own - safe) * UNIT)
        total = total * shrink + tl.load(totals + row * 2 + 1) * factor
        found = found * shrink + tl.load(sums + row * E + depths, mask=depths < E, other=0.0) * factor
        peak = higher
    attended = found / tl.where(total > 0, total, 1.0)
    place = out + (batch * T + query) * (HEADS * E) + head * E + depths
    tl.store(place, attended.to(out.dtype.element_ty), mask=depths < E)
