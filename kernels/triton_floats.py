"""Tiles of linear layers in Triton whose weights are floats of 4 or 8 bits, and products of two floats of 8 bits."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from xformopt.kernels.triton_matmul import block_of, finish

__all__ = ["float8_products", "float_codes_linear", "round_rows"]

# float32 products in three products of tensor cores: 22 bits instead of the 10 of one
_PRECISION = tl.constexpr("tf32x3")
# the largest number of E4M3
_LARGEST = tl.constexpr(448.0)


@triton.jit
def _values(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Return what codes stand for: exponent and mantissa become those of a float16, which is off by a power of two."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    bits = codes.to(tl.uint16)
    bits = ((bits & (SIGN - 1)) << (10 - MANTISSA)) | ((bits & SIGN) << (16 - BITS))
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 2.0 ** (15 - BIAS)


@triton.jit
def _scales(scale, base, places):
    """Return the scales at ``places``: floats; codes of E8M0; or with a ``base``, codes of E4M3 in multiples of it."""
    if scale.dtype.element_ty != tl.uint8:
        return tl.load(scale + places).to(tl.float32)
    codes = tl.load(scale + places)
    if base is None:
        bits = codes.to(tl.int32)
        # 2^-127 has no exponent of its own
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    else:
        return _values(codes, 8, 3, 7) * tl.load(base).to(tl.float32)


@triton.jit
def float_codes_linear(
    x,
    weight,
    scale,
    base,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_row,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``x W^T + bias`` with ``W = values[codes] * scale``; a step lies inside of one group of ``SIZE`` channels.

    Args:
        x: ``[rows, inputs]``, rows ``x_row`` apart.
        weight: Codes, ``[outputs, inputs * BITS / 8]``, contiguous; of 4 bits, the first in the low half of a byte.
        scale: ``[outputs, inputs / SIZE]``, contiguous: floats, or uint8 codes as of ``xf.float_weight_linear``.
        base: One number, or None.
        bias: ``[outputs]`` or None.
        out: ``[rows, outputs]``, contiguous.
        rows: See ``x``.
        outputs: Output channels.
        inputs: Input channels.
        x_row: See ``x``.
        BITS: 4 or 8.
        MANTISSA: Bits of a code's mantissa.
        BIAS: Of a code's exponent.
        SIZE: Input channels of a group.
        M: Rows of a block.
        N: Output channels of a block.
        K: Input channels of a step, which divides ``SIZE``.

    """
    numbers, channels = block_of(rows, outputs, M, N)
    steps = tl.arange(0, K)
    row = (channels % outputs).to(tl.int64)
    left = x + (numbers % rows).to(tl.int64)[:, None] * x_row + steps[None, :]
    right = weight + row[:, None] * (inputs * BITS // 8)
    sums = tl.zeros([M, N], tl.float32)
    for start in range(0, inputs, K):
        if BITS == 4:
            both = tl.load(right + start // 2 + tl.arange(0, K // 2)[None, :])
            codes = tl.interleave(both & 15, both >> 4)
        else:
            codes = tl.load(right + start + steps[None, :])
        factor = _scales(scale, base, row * (inputs // SIZE) + start // SIZE)
        values = (_values(codes, BITS, MANTISSA, BIAS) * factor[:, None]).to(x.dtype.element_ty)
        sums = tl.dot(tl.load(left + start), tl.trans(values), sums, input_precision=_PRECISION)
    finish(sums, bias, out, numbers, channels, rows, outputs, "")


@triton.jit
def round_rows(x, codes, scale, rows, x_row, WIDTH: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr):
    """Round ``R`` rows to E4M3, each in its own range.

    Args:
        x: ``[rows, WIDTH]``, rows ``x_row`` apart.
        codes: uint8, ``[rows, WIDTH]``, contiguous.
        scale: What 1 is worth in each row, ``[rows]`` float32.
        rows: See ``x``.
        x_row: See ``x``.
        WIDTH: Columns.
        R: Rows of a program.
        WIDE: ``WIDTH`` rounded up to a power of two.

    """
    numbers = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    columns = tl.arange(0, WIDE)[None, :]
    here = (numbers < rows)[:, None] & (columns < WIDTH)
    values = tl.load(x + numbers[:, None] * x_row + columns, mask=here, other=0.0).to(tl.float32)
    step = tl.math.div_rn(tl.max(tl.abs(values), 1), tl.full([R], _LARGEST, tl.float32))
    step = tl.where(step > 0, step, 1.0)
    rounded = tl.math.div_rn(values, step[:, None] + tl.zeros_like(values)).to(tl.float8e4nv)
    tl.store(codes + numbers[:, None] * WIDTH + columns, rounded.to(tl.uint8, bitcast=True), mask=here)
    tl.store(scale + numbers, step, mask=numbers < rows)


@triton.jit
def float8_products(
    codes,
    x_scale,
    weight,
    scale,
    base,
    bias,
    out,
    rows,
    outputs,
    inputs,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``x_scale codes (weight scale)^T + bias``, the products of E4M3 by E4M3 on tensor cores, from sm_89 on.

    Args:
        codes: uint8, ``[rows, inputs]``, contiguous.
        x_scale: ``[rows]``.
        weight: uint8, ``[outputs, inputs]``, contiguous.
        scale: See :func:`float_codes_linear`.
        base: See :func:`float_codes_linear`.
        bias: ``[outputs]`` or None.
        out: ``[rows, outputs]``, contiguous.
        rows: See ``codes``.
        outputs: Output channels.
        inputs: Input channels.
        SIZE: Input channels of a group.
        GROUPS: Groups of an output channel; with one, a step may lie partly behind the end.
        M: Rows of a block.
        N: Output channels of a block.
        K: Input channels of a step, which divides ``SIZE`` where there are several groups.

    """
    # sums of tensor cores have fewer bits than float32 on sm_90: no more than a step's products are left to them
    numbers, channels = block_of(rows, outputs, M, N)
    steps = tl.arange(0, K)
    row, channel = (numbers % rows).to(tl.int64), (channels % outputs).to(tl.int64)
    left = codes.to(tl.pointer_type(tl.float8e4nv)) + row[:, None] * inputs + steps[None, :]
    right = weight.to(tl.pointer_type(tl.float8e4nv)) + channel[None, :] * inputs + steps[:, None]
    sums = tl.zeros([M, N], tl.float32)
    for start in range(0, inputs, K):
        if GROUPS == 1:
            is_step = start + steps < inputs
            a = tl.load(left + start, mask=is_step[None, :], other=0.0)
            b = tl.load(right + start, mask=is_step[:, None], other=0.0)
            sums = tl.dot(a, b, sums, max_num_imprecise_acc=K)
        else:
            product = tl.dot(tl.load(left + start), tl.load(right + start), max_num_imprecise_acc=K)
            sums += product * _scales(scale, base, channel * GROUPS + start // SIZE)[None, :]
    if GROUPS == 1:
        sums *= _scales(scale, base, channel)[None, :]
    sums *= tl.load(x_scale + row)[:, None]
    finish(sums, bias, out, numbers, channels, rows, outputs, "")
