"""Triton kernels over rows: norms with their residual, rotary embedding, gates and activations.

All of them are bound by memory: every element is read once, computed in float32 and written once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "activation_rows", "merge_rows", "norm_rows", "rope_rows"]


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    """Apply a function of ``xf.activation`` to float32 numbers."""
    if FUNCTION == "relu":
        # a maximum would turn NaN into 0
        return tl.where(x < 0, 0.0, x)
    elif FUNCTION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif FUNCTION == "gelu_quick":
        return x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(FUNCTION == "silu", "there is no such activation")
        return x * tl.sigmoid(x)


@triton.jit
def norm_rows(
    x,
    residual,
    weight,
    bias,
    total,
    out,
    rows,
    x_row,
    residual_row,
    eps,
    WIDTH: tl.constexpr,
    CENTER: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Normalize ``R`` rows of ``WIDTH`` columns; with a residual, normalize the sum and write that too.

    Args:
        x: Rows ``x_row`` apart.
        residual: Added to ``x``, rows ``residual_row`` apart; None: nothing is.
        weight: ``[WIDTH]`` or None.
        bias: ``[WIDTH]`` or None.
        total: Where the sum goes, contiguous; None without a residual.
        out: Contiguous.
        rows: How many rows there are.
        x_row: See ``x``.
        residual_row: See ``residual``.
        eps: Added to the variance, or to the mean of squares.
        WIDTH: Columns.
        CENTER: Whether the mean is subtracted: layer normalization; otherwise RMS normalization.
        R: Rows of a program.
        WIDE: ``WIDTH`` rounded up to a power of two.

    """
    numbers = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    columns = tl.arange(0, WIDE)[None, :]
    is_column = columns < WIDTH
    here = (numbers < rows) & is_column
    values = tl.load(x + numbers * x_row + columns, mask=here, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + numbers * residual_row + columns, mask=here, other=0.0).to(tl.float32)
        # what is normalized is the sum as it is stored
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + numbers * WIDTH + columns, rounded, mask=here)
        values = rounded.to(tl.float32)
    if CENTER:
        mean = tl.sum(values, 1) / WIDTH
        values = tl.where(is_column, values - mean[:, None], 0.0)
    normalized = values * tl.rsqrt(tl.sum(values * values, 1) / WIDTH + tl.cast(eps, tl.float32))[:, None]
    if weight is not None:
        normalized *= tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    if bias is not None:
        normalized += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + numbers * WIDTH + columns, normalized.to(out.dtype.element_ty), mask=here)


@triton.jit
def rope_rows(
    x,
    cos,
    sin,
    out,
    rows,
    T,
    x_row,
    angle_batch,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rotate ``R`` heads: a row is one head of one token.

    Args:
        x: Tokens ``x_row`` apart, heads of ``D`` adjacent.
        cos: ``[B or 1, T, HALF]``, contiguous, batches ``angle_batch`` apart: 0 for one that all share.
        sin: As ``cos``.
        out: Contiguous.
        rows: Tokens times heads.
        T: Tokens of a sequence.
        x_row: See ``x``.
        angle_batch: See ``cos``.
        HEADS: Heads of a token.
        D: Width of a head.
        HALF: Half of the features that are rotated.
        INTERLEAVED: Whether pairs are adjacent; otherwise they are ``HALF`` apart.
        R: Rows of a program.
        WIDE: ``HALF`` rounded up to a power of two, for interleaved pairs; for others that of ``max(HALF, rest)``.

    """
    numbers = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    is_row = numbers < rows
    tokens, heads = numbers // HEADS, numbers % HEADS
    features = tl.arange(0, WIDE)[None, :]
    angles = tokens // T * angle_batch + tokens % T * HALF + features
    here = is_row & (features < HALF)
    cosines = tl.load(cos + angles, mask=here, other=0.0).to(tl.float32)
    sines = tl.load(sin + angles, mask=here, other=0.0).to(tl.float32)
    source, target = x + tokens * x_row + heads * D, out + numbers * D
    if INTERLEAVED:
        both = tl.arange(0, 2 * WIDE)[None, :]
        is_turned = is_row & (both < 2 * HALF)
        pairs = tl.load(source + both, mask=is_turned, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (R, WIDE, 2)))
        turned = tl.interleave(first * cosines - second * sines, second * cosines + first * sines)
        tl.store(target + both, turned.to(out.dtype.element_ty), mask=is_turned)
    else:
        first = tl.load(source + features, mask=here, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + features, mask=here, other=0.0).to(tl.float32)
        tl.store(target + features, (first * cosines - second * sines).to(out.dtype.element_ty), mask=here)
        tl.store(target + HALF + features, (second * cosines + first * sines).to(out.dtype.element_ty), mask=here)
    if D > 2 * HALF:
        for start in tl.static_range(2 * HALF, D, WIDE):
            kept = is_row & (start + features < D)
            tl.store(target + start + features, tl.load(source + start + features, mask=kept, other=0.0), mask=kept)


@triton.jit
def activation_rows(
    gate,
    up,
    out,
    blocks,
    width,
    gate_row,
    up_row,
    FUNCTION: tl.constexpr,
    N: tl.constexpr,
):
    """``FUNCTION(gate) * up``, or without the factor where ``up`` is None: ``N`` columns of one row.

    Rows are ``width`` columns in ``blocks`` blocks; those of ``gate`` and ``up`` are ``gate_row`` and ``up_row`` apart,
    those of ``out`` adjacent.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * N + tl.arange(0, N)
    here = columns < width
    values = activate(tl.load(gate + row * gate_row + columns, mask=here, other=0.0).to(tl.float32), FUNCTION)
    if up is not None:
        # the activation is a tensor of its own in the definition, rounded to its dtype
        values = values.to(gate.dtype.element_ty).to(tl.float32)
        values *= tl.load(up + row * up_row + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=here)


@triton.jit
def merge_rows(
    x,
    kept,
    sources,
    destinations,
    sizes,
    out,
    totals,
    T,
    KEPT,
    MERGED,
    x_batch,
    x_row,
    WIDTH: tl.constexpr,
    LEAST: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
):
    """Gather one kept token and all that join it, in the order they are listed: no atomics, the same bits every time.

    Args:
        x: ``[B, T, WIDTH]``, sequences ``x_batch`` and tokens ``x_row`` apart.
        kept: ``[B, KEPT]``; this and all below contiguous.
        sources: ``[B, MERGED]``.
        destinations: ``[B, MERGED]``.
        sizes: ``[B, T]`` or None: 1.
        out: ``[B, KEPT, WIDTH]``.
        totals: ``[B, KEPT]``.
        T: Tokens of a sequence.
        KEPT: How many of them stay.
        MERGED: How many of them are merged away.
        x_batch: See ``x``.
        x_row: See ``x``.
        WIDTH: Channels.
        LEAST: What the size is at least when it divides.
        N: ``WIDTH`` rounded up to a power of two.
        S: Sources looked at together.

    """
    place, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, N)
    is_column = columns < WIDTH
    x += batch * x_batch
    own = tl.load(kept + batch * KEPT + place)
    size = tl.full((), 1.0, tl.float32)
    if sizes is not None:
        size = tl.load(sizes + batch * T + own).to(tl.float32)
    total = size
    sums = tl.load(x + own * x_row + columns, mask=is_column, other=0.0).to(tl.float32) * size
    for start in range(0, MERGED, S):
        numbers = start + tl.arange(0, S)
        is_source = numbers < MERGED
        joins = is_source & (tl.load(destinations + batch * MERGED + numbers, mask=is_source, other=-1) == place)
        # most blocks of sources hold none that joins
        for _ in range(0, tl.sum(joins.to(tl.int32), 0)):
            number = tl.min(tl.where(joins, numbers, MERGED), 0)
            joins = joins & (numbers != number)
            token = tl.load(sources + batch * MERGED + number)
            weight = tl.full((), 1.0, tl.float32)
            if sizes is not None:
                weight = tl.load(sizes + batch * T + token).to(tl.float32)
            total += weight
            sums += tl.load(x + token * x_row + columns, mask=is_column, other=0.0).to(tl.float32) * weight
    mean = sums / tl.maximum(total, LEAST)
    row = batch * KEPT + place
    tl.store(out + row * WIDTH + columns, mean.to(out.dtype.element_ty), mask=is_column)
    tl.store(totals + row, total.to(totals.dtype.element_ty))
