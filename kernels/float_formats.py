"""Floating-point formats of few bits: their values, rounding to them, and their storage.

A code is sign, exponent and mantissa from its highest bit down.  FP8 as in Micikevicius et al., arXiv 2209.05433 (E4M3
without infinities, E5M2 like IEEE 754); FP6, FP4 and the shared scales E8M0 as in the OCP Microscaling Formats (MX)
Specification 1.0, where every code is a finite number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from xformopt.kernels.packing import pack, unpack

__all__ = ["E8M0_VALUES", "FORMATS", "FloatFormat", "pack_floats", "round_float", "scale_values", "unpack_floats"]


@dataclass(frozen=True)
class FloatFormat:
    """A format by the widths of its fields.

    Attributes:
        name: As options and attributes write it.
        exponent: Bits of the exponent.
        mantissa: Bits of the mantissa.
        bias: Of the exponent.
        unused: How many codes of each sign, the highest ones, are infinite or not numbers.

    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    unused: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @cached_property
    def values(self) -> tuple[float, ...]:
        """What each code stands for; NaN for codes that are infinite or not numbers."""
        half = [self._magnitude(code) for code in range(2 ** (self.bits - 1))]
        return (*half, *(-value for value in half))

    @property
    def largest(self) -> float:
        """The largest finite value."""
        last: int = 2 ** (self.bits - 1) - 1 - self.unused
        return self.values[last]

    @property
    def smallest_exponent(self) -> int:
        """Of numbers with a full mantissa, and of the steps below them."""
        return 1 - self.bias

    @property
    def largest_exponent(self) -> int:
        """Of the largest finite value."""
        return math.frexp(self.largest)[1] - 1

    def table(self, like: torch.Tensor) -> torch.Tensor:
        """Return ``values`` in the dtype and on the device of a tensor."""
        return torch.tensor(self.values, dtype=like.dtype, device=like.device)

    def _magnitude(self, code: int) -> float:
        if code >= 2 ** (self.bits - 1) - self.unused:
            return math.nan
        exponent, mantissa = code >> self.mantissa, code & (2**self.mantissa - 1)
        if exponent == 0:
            return float(math.ldexp(mantissa, 1 - self.bias - self.mantissa))
        return float(math.ldexp(2**self.mantissa + mantissa, exponent - self.bias - self.mantissa))


FORMATS = {
    found.name: found
    for found in (
        FloatFormat("fp8_e4m3", 4, 3, 7, unused=1),
        FloatFormat("fp8_e5m2", 5, 2, 15, unused=4),
        FloatFormat("fp6_e3m2", 3, 2, 3),
        FloatFormat("fp6_e2m3", 2, 3, 1),
        FloatFormat("fp4_e2m1", 2, 1, 1),
    )
}

# exponents of powers of two: 2^(code - 127), and the last code is not a number
E8M0_VALUES = (*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan)


def round_float(x: torch.Tensor, name: str) -> torch.Tensor:
    """Round to the nearest value of a format, halves to even; what lies beyond the largest becomes the largest.

    NaN stays NaN.  Exact in float32 and float64: all steps are powers of two.
    """
    found = FORMATS[name]
    x = x.clamp(-found.largest, found.largest)
    exponent = (torch.frexp(x).exponent - 1).clamp(min=found.smallest_exponent) - found.mantissa
    step = torch.ldexp(torch.ones_like(x), exponent)
    return (x / step).round() * step


def pack_floats(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last axis: two of 4 bits in a byte, four of 6 bits in three, the first in the low bits.

    Args:
        codes: uint8, ``[..., N]``; N is even for 4 bits, and divided by 4 for 6 bits.
        bits: 4, 6 or 8.

    Returns:
        uint8, ``[..., N * bits / 8]``.

    """
    if bits != 6:
        return pack(codes, bits)
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), -1).flatten(-2)


def unpack_floats(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of :func:`pack_floats`."""
    if bits != 6:
        return unpack(packed, bits, packed.shape[-1] * 8 // bits)
    a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack((a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2), -1).flatten(-2)


def scale_values(scale: torch.Tensor, base: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return stored scales as numbers in the dtype of ``like``.

    Args:
        scale: Floats as they are; or uint8: codes of E4M3 in multiples of ``base``, or without it codes of E8M0.
        base: A scalar.
        like: See above.

    """
    if scale.dtype != torch.uint8:
        return scale.to(like.dtype)
    if base is not None:
        return FORMATS["fp8_e4m3"].table(like)[scale.long()] * base.to(like.dtype)
    return torch.tensor(E8M0_VALUES, dtype=like.dtype, device=like.device)[scale.long()]
