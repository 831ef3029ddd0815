"""Triton kernels of recurrences ``S_t = a_t S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``, a chunk of tokens at a time.

The first kernel hands states from chunk to chunk and writes the one before each; the second computes all chunks at
once, from that state and from the products inside of the chunk (Yang et al., arXiv 2312.06635).  As in
``kernels/chunks.py``, only sums of log decays are exponentiated, never differences of running sums.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chunk_states", "decayed_outputs", "gated_outputs"]

# float32 products in three products of tensor cores: 22 bits instead of the 10 of one
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def chunk_states(
    k,
    v,
    decay,
    states,
    sums,
    T,
    chunks,
    k_batch,
    k_row,
    v_batch,
    v_row,
    decay_batch,
    decay_row,
    decay_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    GATED: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
):
    """Write the state before each chunk: programs are ``(parts of a state, heads, sequences)``.

    Args:
        k: Keys, one row a token, ``k_row`` apart; sequences ``k_batch`` apart.
        v: Values alike.
        decay: Log decays, one a token and head with strides ``decay_*``, or one a token and channel of a key
            (``GATED``); None: nothing decays.
        states: ``[B, heads, chunks, D, E]`` float32, contiguous.
        sums: Sum of all keys before each chunk, ``[B, heads, chunks, D]`` float32; None: not wanted.
        T: Tokens of a sequence.
        chunks: Chunks of a sequence.
        k_batch: See ``k``.
        k_row: See ``k``.
        v_batch: See ``k``.
        v_row: See ``k``.
        decay_batch: See ``decay``.
        decay_row: See ``decay``.
        decay_head: See ``decay``.
        GROUP: Heads that share keys.
        D: Width of a key.
        E: Width of a value.
        GATED: See ``decay``.
        C: Tokens of a chunk.
        N: Channels of a key that a program takes.
        M: Channels of a value that it takes.

    """
    parts: tl.constexpr = (E + M - 1) // M
    widths = tl.program_id(0) // parts * N + tl.arange(0, N)
    depths = tl.program_id(0) % parts * M + tl.arange(0, M)
    is_width, is_depth = widths < D, depths < E
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += batch * k_batch + head // GROUP * D
    v += batch * v_batch + head * E
    first = (batch * tl.num_programs(1) + head) * chunks
    if decay is not None:
        decay += batch * decay_batch + head * decay_head
    tokens = tl.arange(0, C)
    state = tl.zeros([N, M], tl.float32)
    total = tl.zeros([N], tl.float32)
    for chunk in range(0, chunks):
        place = states + (first + chunk) * (D * E) + widths[:, None] * E + depths[None, :]
        tl.store(place, state, mask=is_width[:, None] & is_depth[None, :])
        at = chunk * C + tokens
        is_token = at < T
        here = is_token[:, None] & is_width[None, :]
        keys = tl.load(k + at[:, None] * k_row + widths[None, :], mask=here, other=0.0).to(tl.float32)
        values = tl.load(
            v + at[:, None] * v_row + depths[None, :], mask=is_token[:, None] & is_depth[None, :], other=0.0
        )
        if sums is not None:
            tl.store(sums + (first + chunk) * D + widths, total, mask=is_width & (tl.program_id(0) % parts == 0))
            total += tl.sum(keys, 0)
        if decay is not None:
            # a token's key decays by all that comes after it in the chunk
            is_after = (tokens + 1 < C) & (at + 1 < T)
            if GATED:
                gates = decay + at[:, None] * decay_row + widths[None, :]
                after = tl.load(gates + decay_row, mask=is_after[:, None] & is_width[None, :], other=0.0)
                keys *= tl.exp(tl.cumsum(after.to(tl.float32), 0, reverse=True))
                whole = tl.sum(tl.load(gates, mask=here, other=0.0).to(tl.float32), 0)
                state *= tl.exp(whole)[:, None]
            else:
                steps = decay + at * decay_row
                after = tl.load(steps + decay_row, mask=is_after, other=0.0).to(tl.float32)
                keys *= tl.exp(tl.cumsum(after, 0, reverse=True))[:, None]
                state *= tl.exp(tl.sum(tl.load(steps, mask=is_token, other=0.0).to(tl.float32), 0))
        state = tl.dot(tl.trans(keys.to(values.dtype)), values, state, input_precision=_PRECISION)


@triton.jit
def decayed_outputs(
    q,
    k,
    v,
    decay,
    states,
    sums,
    added,
    rate,
    out,
    T,
    chunks,
    scale,
    eps,
    added_batch,
    added_row,
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    decay_batch,
    decay_row,
    decay_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
):
    """Outputs of one chunk where a head has one decay a token: ``(chunks times parts of a value, heads, sequences)``.

    Operands are those of :func:`chunk_states`, and:

    Args:
        q: Queries, like ``k``.
        k: See :func:`chunk_states`.
        v: See :func:`chunk_states`.
        decay: See :func:`chunk_states`.
        states: See :func:`chunk_states`.
        sums: See there; where it is given, each output is divided by the sum of its weights.
        added: Added to the outputs, times the ``rate`` of each head: like ``v``; None: nothing is.
        rate: ``[HEADS]``.
        out: ``[B, T, HEADS * E]``, contiguous.
        T: See :func:`chunk_states`.
        chunks: See :func:`chunk_states`.
        scale: Factor of the products.
        eps: Added to the sum of weights.
        added_batch: See ``added``.
        added_row: See ``added``.
        q_batch: See ``q``.
        q_row: See ``q``.
        k_batch: See :func:`chunk_states`.
        k_row: See :func:`chunk_states`.
        v_batch: See :func:`chunk_states`.
        v_row: See :func:`chunk_states`.
        decay_batch: See :func:`chunk_states`.
        decay_row: See :func:`chunk_states`.
        decay_head: See :func:`chunk_states`.
        HEADS: Heads.
        GROUP: Heads that share queries and keys.
        D: Width of a key.
        E: Width of a value.
        C: Tokens of a chunk.
        WIDE: ``D`` rounded up to a power of two, at least 16.
        M: Channels of a value that a program takes.

    """
    parts: tl.constexpr = (E + M - 1) // M
    chunk = tl.program_id(0) // parts
    widths, depths = tl.arange(0, WIDE), tl.program_id(0) % parts * M + tl.arange(0, M)
    is_width, is_depth = widths < D, depths < E
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens = tl.arange(0, C)
    at = chunk * C + tokens
    is_token = at < T
    here = is_token[:, None] & is_width[None, :]
    group = head // GROUP * D
    queries = tl.load(q + batch * q_batch + group + at[:, None] * q_row + widths[None, :], mask=here, other=0.0)
    keys = tl.load(k + batch * k_batch + group + at[:, None] * k_row + widths[None, :], mask=here, other=0.0)
    of_values = is_token[:, None] & is_depth[None, :]
    values = tl.load(v + batch * v_batch + head * E + at[:, None] * v_row + depths[None, :], mask=of_values, other=0.0)
    weights = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION)
    if decay is not None:
        place = decay + batch * decay_batch + head * decay_head + at * decay_row
        step = tl.load(place, mask=is_token, other=0.0).to(tl.float32)
        between = tl.cumsum(tl.where(tokens[:, None] > tokens[None, :], step[:, None], 0.0), 0)
        weights *= tl.exp(between)
        queries = (queries.to(tl.float32) * tl.exp(tl.cumsum(step, 0))[:, None]).to(queries.dtype)
    weights = tl.where(tokens[:, None] >= tokens[None, :], weights, 0.0)
    first = (batch * HEADS + head) * chunks + chunk
    of_state = is_width[:, None] & is_depth[None, :]
    state = tl.load(states + first * (D * E) + widths[:, None] * E + depths[None, :], mask=of_state, other=0.0)
    found = tl.dot(queries, state.to(queries.dtype), input_precision=_PRECISION)
    found = tl.dot(weights.to(values.dtype), values, found, input_precision=_PRECISION) * tl.cast(scale, tl.float32)
    if sums is not None:
        total = tl.load(sums + first * D + widths, mask=is_width, other=0.0)
        weight = tl.sum(weights, 1) + tl.sum(queries.to(tl.float32) * total[None, :], 1)
        found /= (weight + tl.cast(eps, tl.float32))[:, None]
    if added is not None:
        place = added + batch * added_batch + head * E + at[:, None] * added_row + depths[None, :]
        more = tl.load(place, mask=of_values, other=0.0).to(tl.float32)
        found += more * tl.load(rate + head).to(tl.float32)
    place = out + (batch * T + at[:, None]) * (HEADS * E) + head * E + depths[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=of_values)


@triton.jit
def gated_outputs(
    q,
    k,
    v,
    gate,
    states,
    out,
    T,
    chunks,
    scale,
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    gate_batch,
    gate_row,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
):
    """Outputs of ``B`` tokens of a chunk where every channel has its own decay.

    Programs are ``(blocks of tokens times parts of a value, heads, sequences)``.  Inside of the block, key after key;
    keys of earlier blocks of the chunk by products: their gates are those up to the end of their block, those of the
    blocks between, and those from the start of this block on, each a sum that is not positive.

    Args:
        q: Queries, one row a token; ``k``, ``v`` and ``gate`` alike, with the strides of their names.
        k: See ``q``.
        v: See ``q``.
        gate: Log decays of each channel of a key.
        states: See :func:`chunk_states`.
        out: ``[B, T, HEADS * E]``, contiguous.
        T: Tokens of a sequence.
        chunks: Chunks of a sequence.
        scale: Factor of the products.
        q_batch: See ``q``.
        q_row: See ``q``.
        k_batch: See ``q``.
        k_row: See ``q``.
        v_batch: See ``q``.
        v_row: See ``q``.
        gate_batch: See ``q``.
        gate_row: See ``q``.
        HEADS: Heads.
        D: Width of a key.
        E: Width of a value.
        C: Tokens of a chunk, a multiple of ``B``.
        B: Tokens of a block.
        WIDE: ``D`` rounded up to a power of two, at least 16.
        M: Channels of a value that a program takes.

    """
    parts: tl.constexpr = (E + M - 1) // M
    start = tl.program_id(0) // parts * B
    chunk = start // C
    widths, depths = tl.arange(0, WIDE), tl.program_id(0) % parts * M + tl.arange(0, M)
    is_width, is_depth = widths < D, depths < E
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += batch * q_batch + head * D
    k += batch * k_batch + head * D
    v += batch * v_batch + head * E
    gate += batch * gate_batch + head * D
    tokens = tl.arange(0, B)
    at = start + tokens
    is_token = at < T
    here = is_token[:, None] & is_width[None, :]
    queries = tl.load(q + at[:, None] * q_row + widths[None, :], mask=here, other=0.0).to(tl.float32)
    # this block, from its last key to its first: `between` sums up the gates after the key, up to each query
    found = tl.zeros([B, M], tl.float32)
    between = tl.zeros([B, WIDE], tl.float32)
    for back in range(0, B):
        number = B - 1 - back
        key = start + number
        is_key = key < T
        one = tl.load(k + key * k_row + widths, mask=is_key & is_width, other=0.0).to(tl.float32)
        value = tl.load(v + key * v_row + depths, mask=is_key & is_depth, other=0.0).to(tl.float32)
        weights = tl.sum(queries * one[None, :] * tl.exp(between), 1)
        found += tl.where(tokens >= number, weights, 0.0)[:, None] * value[None, :]
        own = tl.load(gate + key * gate_row + widths, mask=is_key & is_width, other=0.0).to(tl.float32)
        between += tl.where(tokens >= number, 1.0, 0.0)[:, None] * own[None, :]
    # now `between` sums up the gates from the block's first token on
    decayed = queries * tl.exp(between)
    passed = tl.zeros([WIDE], tl.float32)
    for back in range(0, (start - chunk * C) // B):
        earlier = start - (back + 1) * B + tokens
        gates = gate + earlier[:, None] * gate_row + widths[None, :]
        after = tl.load(gates + gate_row, mask=(tokens + 1 < B)[:, None] & is_width[None, :], other=0.0)
        to_end = tl.cumsum(after.to(tl.float32), 0, reverse=True)
        keys = tl.load(k + earlier[:, None] * k_row + widths[None, :], mask=is_width[None, :], other=0.0)
        left = (keys.to(tl.float32) * tl.exp(to_end + passed[None, :])).to(keys.dtype)
        values = tl.load(v + earlier[:, None] * v_row + depths[None, :], mask=is_depth[None, :], other=0.0)
        weights = tl.dot(decayed.to(keys.dtype), tl.trans(left), input_precision=_PRECISION)
        found = tl.dot(weights.to(values.dtype), values, found, input_precision=_PRECISION)
        passed += tl.sum(tl.load(gates, mask=is_width[None, :], other=0.0).to(tl.float32), 0)
    first = (batch * HEADS + head) * chunks + chunk
    of_state = is_width[:, None] & is_depth[None, :]
    state = tl.load(states + first * (D * E) + widths[:, None] * E + depths[None, :], mask=of_state, other=0.0)
    decayed *= tl.exp(passed)[None, :]
    dtype = v.dtype.element_ty
    found = tl.dot(decayed.to(dtype), state.to(dtype), found, input_precision=_PRECISION) * tl.cast(scale, tl.float32)
    place = out + (batch * T + at[:, None]) * (HEADS * E) + head * E + depths[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=is_token[:, None] & is_depth[None, :])
