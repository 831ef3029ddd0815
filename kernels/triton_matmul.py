"""Tiles of linear layers in Triton: float weights, weights of few bits, and products of 8-bit integers.

A program computes a block of ``M`` rows and ``N`` output channels in steps of ``K`` input channels.  Programs that read
the same weights run after each other, in groups of rows, so that they find them in the cache.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from xformopt.kernels.triton_rows import activate

__all__ = ["block_of", "finish", "float_linear", "integer_linear", "packed_linear"]

# float32 products in three products of tensor cores: 22 bits instead of the 10 of one
_PRECISION = tl.constexpr("tf32x3")
# blocks of rows that go through all output channels together
_GROUP = tl.constexpr(8)
# adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even
_ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def block_of(rows, outputs, M: tl.constexpr, N: tl.constexpr):
    """Return the rows and the output channels of this program."""
    across, down = tl.cdiv(outputs, N), tl.cdiv(rows, M)
    program = tl.program_id(0)
    first = program // (_GROUP * across) * _GROUP
    height = tl.minimum(down - first, _GROUP)
    within = program % (_GROUP * across)
    return (first + within % height) * M + tl.arange(0, M), within // height * N + tl.arange(0, N)


@triton.jit
def finish(sums, bias, out, numbers, channels, rows, outputs, FUNCTION: tl.constexpr):
    """Add the bias, apply the function and write; ``FUNCTION`` may be empty."""
    is_channel = channels < outputs
    if bias is not None:
        sums += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if FUNCTION != "":
        sums = activate(sums, FUNCTION)
    places = out + numbers.to(tl.int64)[:, None] * outputs + channels[None, :]
    tl.store(places, sums.to(out.dtype.element_ty), mask=(numbers < rows)[:, None] & is_channel[None, :])


@triton.jit
def float_linear(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_row,
    FUNCTION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``FUNCTION(x weight^T + bias)``: rows of x ``x_row`` apart, weight ``[outputs, inputs]`` contiguous."""
    numbers, channels = block_of(rows, outputs, M, N)
    steps = tl.arange(0, K)
    # what lies behind the end is read from the start, and not written
    left = x + (numbers % rows).to(tl.int64)[:, None] * x_row + steps[None, :]
    right = weight + (channels % outputs).to(tl.int64)[None, :] * inputs + steps[:, None]
    sums = tl.zeros([M, N], tl.float32)
    for start in range(0, inputs, K):
        is_step = start + steps < inputs
        a = tl.load(left + start, mask=is_step[None, :], other=0.0)
        b = tl.load(right + start, mask=is_step[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=_PRECISION)
    finish(sums, bias, out, numbers, channels, rows, outputs, FUNCTION)


@triton.jit
def packed_linear(
    x,
    weight,
    scale,
    zero,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_row,
    zero_row,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``x W^T + bias`` with ``W = (codes - zero) * scale``; a step lies inside of one group of ``SIZE`` channels.

    Args:
        x: ``[rows, inputs]``, rows ``x_row`` apart.
        weight: Codes of 4 or 8 bits, ``[outputs, inputs * BITS / 8]``, contiguous; of 4 bits, the first in the low half
            of a byte.
        scale: ``[outputs, inputs / SIZE]``, contiguous.
        zero: Codes of zero, packed alike, ``zero_row`` bytes a channel; None: the middle code.
        bias: ``[outputs]`` or None.
        out: ``[rows, outputs]``, contiguous.
        rows: See ``x``.
        outputs: Output channels.
        inputs: Input channels.
        x_row: See ``x``.
        zero_row: See ``zero``.
        BITS: 4 or 8.
        SIZE: Input channels of a group.
        M: Rows of a block.
        N: Output channels of a block.
        K: Input channels of a step, which divides ``SIZE``.

    """
    numbers, channels = block_of(rows, outputs, M, N)
    steps = tl.arange(0, K)
    row = (channels % outputs).to(tl.int64)
    groups = inputs // SIZE
    left = x + (numbers % rows).to(tl.int64)[:, None] * x_row + steps[None, :]
    right = weight + row[:, None] * (inputs * BITS // 8)
    sums = tl.zeros([M, N], tl.float32)
    for start in range(0, inputs, K):
        if BITS == 4:
            both = tl.load(right + start // 2 + tl.arange(0, K // 2)[None, :])
            codes = tl.interleave(both & 15, both >> 4)
        else:
            codes = tl.load(right + start + steps[None, :])
        group = start // SIZE
        if zero is None:
            shift = tl.full([N], 2 ** (BITS - 1), tl.float32)
        elif BITS == 4:
            pair = tl.load(zero + row * zero_row + group // 2)
            shift = (pair.to(tl.int32) >> (group % 2 * 4) & 15).to(tl.float32)
        else:
            shift = tl.load(zero + row * zero_row + group).to(tl.float32)
        factor = tl.load(scale + row * groups + group).to(tl.float32)
        values = ((codes.to(tl.float32) - shift[:, None]) * factor[:, None]).to(x.dtype.element_ty)
        sums = tl.dot(tl.load(left + start), tl.trans(values), sums, input_precision=_PRECISION)
    finish(sums, bias, out, numbers, channels, rows, outputs, "")


@triton.jit
def integer_linear(
    x,
    weight,
    scale,
    bias,
    x_scale,
    x_zero,
    out,
    rows,
    outputs,
    inputs,
    x_row,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``(codes - x_zero) weight^T * (x_scale * scale) + bias``, ``codes = clip(round(x / x_scale) + x_zero, 0, 255)``.

    Activations become codes as they are read.  Tensor cores multiply signed bytes, so 128 is taken off each code, and
    ``128 - x_zero`` times the sum of the weights is added in the end.

    Args:
        x: ``[rows, inputs]``, rows ``x_row`` apart.
        weight: int8 ``[outputs, inputs]``, contiguous.
        scale: ``[outputs]``.
        bias: ``[outputs]`` or None.
        x_scale: One number.
        x_zero: One code.
        out: ``[rows, outputs]``, contiguous.
        rows: See ``x``.
        outputs: Output channels.
        inputs: Input channels.
        x_row: See ``x``.
        M: Rows of a block.
        N: Output channels of a block.
        K: Input channels of a step.

    """
    numbers, channels = block_of(rows, outputs, M, N)
    steps = tl.arange(0, K)
    step = tl.load(x_scale).to(tl.float32)
    middle = tl.load(x_zero).to(tl.int32)
    left = x + (numbers % rows).to(tl.int64)[:, None] * x_row + steps[None, :]
    right = weight + (channels % outputs).to(tl.int64)[None, :] * inputs + steps[:, None]
    sums = tl.zeros([M, N], tl.int32)
    weights = tl.zeros([N], tl.int32)
    for start in range(0, inputs, K):
        is_step = start + steps < inputs
        a = tl.load(left + start, mask=is_step[None, :], other=0.0).to(tl.float32)
        b = tl.load(right + start, mask=is_step[:, None], other=0)
        # far outside of the codes there is nothing to round
        scaled = tl.minimum(tl.maximum(tl.math.div_rn(a, step), -512.0), 512.0)
        rounded = ((scaled + _ROUNDING) - _ROUNDING).to(tl.int32) + middle
        codes = (tl.minimum(tl.maximum(rounded, 0), 255) - 128).to(tl.int8)
        # where there are no channels the weights are zero, whatever the codes
        sums = tl.dot(codes, b, sums, out_dtype=tl.int32)
        weights += tl.sum(b.to(tl.int32), 0)
    sums += ((128 - middle) * weights)[None, :]
    worth = step * tl.load(scale + channels, mask=channels < outputs, other=0.0).to(tl.float32)
    finish(sums.to(tl.float32) * worth[None, :], bias, out, numbers, channels, rows, outputs, "")
