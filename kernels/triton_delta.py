"""Triton kernels of the delta rule ``S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T``, a chunk of tokens at a time.

The WY form (Yang et al., arXiv 2406.06484): with ``X = (I + tril(beta k k^T, -1))^-1 beta`` a chunk writes
``X v - X k S`` from the state ``S`` before it.  The first kernel computes ``X k`` and ``X v`` of all chunks at once,
the second hands the state from chunk to chunk; outputs are then those of a recurrence without decay.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["delta_states", "delta_systems"]

# float32 products in three products of tensor cores: 22 bits instead of the 10 of one
_PRECISION = tl.constexpr("tf32x3")
# rows of a system that are solved one after another
_ROWS = tl.constexpr(16)


@triton.jit
def _inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``(I + lower)^-1`` of a matrix ``[C, C]`` that has nothing on its diagonal and above.

    Blocks of 16 on the diagonal row by row, all of them together; then of twice the size: where ``X`` inverts the
    blocks and ``L`` is what lies below them in a block of twice the size, ``X - X L X`` inverts that.
    """
    numbers, blocks = tl.arange(0, _ROWS), tl.arange(0, C // _ROWS)
    is_diagonal = (blocks[:, None, None, None] == blocks[None, None, :, None]).broadcast_to(
        C // _ROWS, _ROWS, C // _ROWS, _ROWS
    )
    apart = tl.reshape(lower, [C // _ROWS, _ROWS, C // _ROWS, _ROWS])
    small = tl.sum(tl.where(is_diagonal, apart, 0.0), 2)  # [blocks, rows, columns]
    found = tl.where(numbers[None, :, None] == numbers[None, None, :], 1.0, 0.0) + tl.zeros_like(small)
    for number in range(1, _ROWS):
        # rows before this one are solved: what it has of them comes off
        row = tl.sum(tl.where(numbers[None, :, None] == number, small, 0.0), 1)  # [blocks, columns]
        less = tl.sum(row[:, :, None] * found, 1)
        found = tl.where(numbers[None, :, None] == number, found - less[:, None, :], found)
    inverse = tl.reshape(tl.where(is_diagonal, found[:, :, None, :], 0.0), [C, C])
    if C >= 2 * _ROWS:
        inverse = _joined(inverse, lower, _ROWS, C, PRECISION)
    if C >= 4 * _ROWS:
        inverse = _joined(inverse, lower, 2 * _ROWS, C, PRECISION)
    return inverse


@triton.jit
def _joined(inverse, lower, SIZE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of blocks of ``2 SIZE`` on the diagonal, from that of blocks of ``SIZE``."""
    at = tl.arange(0, C) // SIZE
    below = tl.where((at[:, None] == at[None, :] + 1) & (at % 2 == 1)[:, None], lower, 0.0)
    return inverse - tl.dot(inverse, tl.dot(below, inverse, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def _times(matrix, x, out, at, T, x_row, out_row, WIDTH: tl.constexpr, M: tl.constexpr):
    """Write ``matrix`` times the rows ``at`` of ``x``, ``M`` columns at a time."""
    is_token = at < T
    for first in tl.static_range(0, WIDTH, M):
        columns = first + tl.arange(0, M)
        here = is_token[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(x + at[:, None] * x_row + columns[None, :], mask=here, other=0.0)
        product = tl.dot(matrix.to(values.dtype), values, input_precision=_PRECISION)
        tl.store(out + at[:, None] * out_row + columns[None, :], product.to(out.dtype.element_ty), mask=here)


@triton.jit
def delta_systems(
    k,
    v,
    beta,
    keys,
    values,
    T,
    k_batch,
    k_row,
    v_batch,
    v_row,
    beta_batch,
    beta_row,
    beta_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
):
    """Write ``X k`` and ``X v`` of one chunk: programs are ``(chunks, heads, sequences)``.

    Args:
        k: Keys, one row a token, ``k_row`` apart; sequences ``k_batch`` apart.
        v: Values alike.
        beta: One a token and head, with strides ``beta_*``.
        keys: ``X k``, ``[B, T, HEADS * D]``, contiguous.
        values: ``X v``, ``[B, T, HEADS * E]``, contiguous.
        T: Tokens of a sequence.
        k_batch: See ``k``.
        k_row: See ``k``.
        v_batch: See ``k``.
        v_row: See ``k``.
        beta_batch: See ``beta``.
        beta_row: See ``beta``.
        beta_head: See ``beta``.
        HEADS: Heads.
        D: Width of a key.
        E: Width of a value.
        C: Tokens of a chunk: 16, 32 or 64.
        M: Channels that are taken at once.

    """
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += batch * k_batch + head * D
    v += batch * v_batch + head * E
    tokens = tl.arange(0, C)
    at = tl.program_id(0) * C + tokens
    is_token = at < T
    rate = tl.load(beta + batch * beta_batch + head * beta_head + at * beta_row, mask=is_token, other=0.0)
    rate = rate.to(tl.float32)
    products = tl.zeros([C, C], tl.float32)
    for first in tl.static_range(0, D, M):
        columns = first + tl.arange(0, M)
        here = is_token[:, None] & (columns < D)[None, :]
        part = tl.load(k + at[:, None] * k_row + columns[None, :], mask=here, other=0.0)
        products = tl.dot(part, tl.trans(part), products, input_precision=_PRECISION)
    lower = tl.where(tokens[:, None] > tokens[None, :], products * rate[:, None], 0.0)
    # of halves one product is more than enough, and three would not fit the registers
    PRECISION: tl.constexpr = _PRECISION if k.dtype.element_ty == tl.float32 else "tf32"
    matrix = _inverse(lower, C, PRECISION) * rate[None, :]
    _times(matrix, k, keys + batch * T * (HEADS * D) + head * D, at, T, k_row, HEADS * D, D, M)
    _times(matrix, v, values + batch * T * (HEADS * E) + head * E, at, T, v_row, HEADS * E, E, M)


@triton.jit
def delta_states(
    k,
    keys,
    values,
    given,
    states,
    left,
    T,
    chunks,
    k_batch,
    k_row,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
):
    """Write the state before each chunk, and what each token writes: ``(parts of a value, heads, sequences)``.

    Args:
        k: Keys, one row a token, ``k_row`` apart; sequences ``k_batch`` apart.
        keys: See :func:`delta_systems`.
        values: See there; becomes ``X v - X k S``.
        given: The state before the first token, ``[B, HEADS, D, E]``, contiguous; None: zeros.
        states: ``[B, HEADS, chunks, D, E]`` float32, contiguous.
        left: Where the state after the last token goes, like ``given``; None: not wanted.
        T: Tokens of a sequence.
        chunks: Chunks of a sequence.
        k_batch: See ``k``.
        k_row: See ``k``.
        HEADS: Heads.
        D: Width of a key.
        E: Width of a value.
        C: Tokens of a chunk.
        WIDE: ``D`` rounded up to a power of two, at least 16.
        M: Channels of a value that a program takes.

    """
    widths, depths = tl.arange(0, WIDE), tl.program_id(0) * M + tl.arange(0, M)
    is_width, is_depth = widths < D, depths < E
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += batch * k_batch + head * D
    keys += batch * T * (HEADS * D) + head * D
    values += batch * T * (HEADS * E) + head * E
    of_state = is_width[:, None] & is_depth[None, :]
    place = widths[:, None] * E + depths[None, :]
    one = batch * HEADS + head
    state = tl.zeros([WIDE, M], tl.float32)
    if given is not None:
        state += tl.load(given + one * (D * E) + place, mask=of_state, other=0.0).to(tl.float32)
    tokens = tl.arange(0, C)
    for chunk in range(0, chunks):
        tl.store(states + (one * chunks + chunk) * (D * E) + place, state, mask=of_state)
        at = chunk * C + tokens
        is_token = at < T
        of_keys = is_token[:, None] & is_width[None, :]
        of_values = is_token[:, None] & is_depth[None, :]
        read = tl.load(keys + at[:, None] * (HEADS * D) + widths[None, :], mask=of_keys, other=0.0)
        target = values + at[:, None] * (HEADS * E) + depths[None, :]
        written = tl.load(target, mask=of_values, other=0.0).to(tl.float32)
        written -= tl.dot(read, state.to(read.dtype), input_precision=_PRECISION)
        rounded = written.to(values.dtype.element_ty)
        tl.store(target, rounded, mask=of_values)
        own = tl.load(k + at[:, None] * k_row + widths[None, :], mask=of_keys, other=0.0)
        state = tl.dot(tl.trans(own), rounded, state, input_precision=_PRECISION)
    if left is not None:
        tl.store(left + one * (D * E) + place, state.to(left.dtype.element_ty), mask=of_state)
