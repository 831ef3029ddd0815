"""Searching the quantizers of one product, so that its output changes least: what AdaLog does layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.passes.quantize.support.low_bit import Logarithmic, Quantizer, Uniform
from xformopt.passes.quantize.support.progressive_search import progressive_search
from xformopt.passes.quantize.support.quantization import GroupCodes, dequantized

__all__ = ["LinearSearch", "ProductSearch", "is_behind_gelu", "rows_in_range", "split_heads"]

# r of AdaLog's base 2^(q / r), and the q that are tried
_DENOMINATOR = 37
_SMALLEST_BASE, _LARGEST_BASE = 10, 138
# minus the least value of GELU
_GELU_SHIFT = 0.16997
_GELUS = ("gelu", "gelu_tanh", "gelu_quick")
# how far the ends of a range move inwards at most, as a part of it
_CUT = 0.5
_COARSE = 8


def is_behind_gelu(value: fx.Node) -> bool:
    """Whether a value is the result of a GELU, exact or approximated."""
    return is_call(value, xf.activation, xf.linear_activation) and arguments(value)["function"] in _GELUS


def split_heads(value: torch.Tensor, heads: int, wanted: int) -> torch.Tensor:
    """Return ``[B, T, heads * D]`` as ``[B, wanted, T, D]``, each head repeated for its group."""
    apart: torch.Tensor = value.unflatten(-1, (heads, -1)).transpose(1, 2)
    return apart.repeat_interleave(wanted // heads, 1)


@dataclass
class _Side:
    """One searched operand: how parameters in [0, 1] make a quantizer of it."""

    values: torch.Tensor
    bits: int
    is_log: bool
    shift: float = 0.0
    scale: float | None = None
    grid: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.grid = (2 * _COARSE,) if self.is_log and self.scale is not None else (_COARSE, _COARSE)
        self.low, self.high = min(float(self.values.min()), 0.0), max(float(self.values.max()), 0.0)

    def quantizer(self, parameters: torch.Tensor) -> Quantizer:
        """Return the quantizer of parameters ``[D]``."""
        given = parameters.tolist()
        if not self.is_log:
            low, high = self.low * (1 - _CUT * given[0]), self.high * (1 - _CUT * given[1])
            scale = float(torch.tensor((high - low) / (2**self.bits - 1), dtype=torch.float32))
            return Uniform(self.bits, scale, round(-low / scale))
        base = round(_SMALLEST_BASE + given[-1] * (_LARGEST_BASE - _SMALLEST_BASE))
        scale = (self.high + self.shift) * (1 - _CUT * given[0]) if self.scale is None else self.scale
        return Logarithmic(self.bits, scale, base, _DENOMINATOR, round_table=True, shift=self.shift)

    def search(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Quantizer, torch.Tensor]:
        """Return the quantizer for which ``loss`` of the quantized values is least, and those values."""

        def tried(parameters: torch.Tensor) -> torch.Tensor:
            return loss(self.rounded(self.quantizer(parameters[0]))).reshape(1)

        best = self.quantizer(progressive_search(tried, 1, self.grid)[0])
        return best, self.rounded(best)

    def rounded(self, quantizer: Quantizer) -> torch.Tensor:
        """Return the operand quantized, a shift taken back."""
        found = quantizer.values(self.values)
        return found - self.shift if self.shift else found


@dataclass
class ProductSearch:
    """Searches the quantizers of both operands of ``left @ right``; ``is_log``: the left one is a softmax's result."""

    left: torch.Tensor
    right: torch.Tensor
    bits: int
    is_log: bool

    def run(self, rounds: int) -> tuple[Quantizer, Quantizer]:
        """Search by turns, each operand against the other as it is quantized by then."""
        wanted = self.left @ self.right
        one = _Side(self.left, self.bits, self.is_log, scale=1.0 if self.is_log else None)
        other = _Side(self.right, self.bits, False)
        right = self.right
        for _ in range(rounds):
            held = right
            first, left = one.search(lambda tried: (tried @ held - wanted).square().sum())  # noqa: B023
            second, right = other.search(lambda tried: (left @ tried - wanted).square().sum())  # noqa: B023
        return first, second


@dataclass
class LinearSearch:
    """Searches the quantizers of a value and of the weights that read it.

    Attributes:
        rows: Samples of the value, ``[N, I]``.
        weight: ``[O, I]``, of all readers one after another.
        free: Which rows of the weight are searched; the others are rounded to nearest, bool ``[O]``.
        weight_bits: Of a weight's code.
        activation_bits: Of an activation's code.
        is_log: Whether the value is a GELU's result.
        settled: The value's quantizer where it is not searched.

    """

    rows: torch.Tensor
    weight: torch.Tensor
    free: torch.Tensor
    weight_bits: int
    activation_bits: int
    is_log: bool
    settled: Quantizer | None

    def run(self, rounds: int) -> tuple[Quantizer, GroupCodes]:
        """Search by turns; returns the value's quantizer and the weight's codes."""
        wanted = self.rows @ self.weight.t()
        shift = _GELU_SHIFT if self.is_log else 0.0
        side = _Side(self.rows, self.activation_bits, self.is_log, shift)
        codes = rows_in_range(self.weight, torch.zeros(len(self.weight), 2), self.weight_bits)
        # the first search of activations sees the weights as they are
        weight = self.weight
        for _ in range(1 if self.settled is not None else rounds):
            held = weight
            if self.settled is not None:
                activation, rows = self.settled, self.settled.values(self.rows)
            else:
                activation, rows = side.search(lambda tried: (tried @ held.t() - wanted).square().sum())  # noqa: B023
            codes = self._searched_weight(rows, wanted)
            weight = dequantized(codes)
        return activation, codes

    def bias(self, codes: GroupCodes, before: torch.Tensor | None) -> torch.Tensor | None:
        """Return the bias that takes the shift back, by the quantized weight; None where there is no shift."""
        if not self.is_log or self.settled is not None:
            return None
        taken = _GELU_SHIFT * dequantized(codes).double().sum(1)
        return ((0 if before is None else before.double()) - taken).to(self.weight.dtype)

    def _searched_weight(self, rows: torch.Tensor, wanted: torch.Tensor) -> GroupCodes:
        def loss(cuts: torch.Tensor) -> torch.Tensor:
            tried = dequantized(rows_in_range(self.weight, cuts, self.weight_bits))
            return (rows @ tried.t() - wanted).square().sum(0)

        cuts = progressive_search(loss, len(self.weight), (_COARSE, _COARSE))
        cuts[~self.free] = 0
        return rows_in_range(self.weight, cuts, self.weight_bits)


def rows_in_range(weight: torch.Tensor, cuts: torch.Tensor, bits: int) -> GroupCodes:
    """Round a matrix to nearest, one scale and zero point per row.

    Args:
        weight: ``[O, I]``.
        cuts: How far the lower and the upper end of each row's range move inwards, as parts of half of them,
            ``[O, 2]``.
        bits: Of a code.

    """
    last = 2**bits - 1
    factors = 1 - _CUT * cuts.to(weight.dtype)
    low = weight.amin(1, keepdim=True).clamp(max=0) * factors[:, :1]
    high = weight.amax(1, keepdim=True).clamp(min=0) * factors[:, 1:]
    scale = torch.where(high > low, (high - low) / last, torch.ones_like(high))
    zero = (-low / scale).round().clamp(0, last)
    codes = ((weight / scale).round() + zero).clamp(0, last)
    return GroupCodes(codes.to(torch.uint8), scale, zero.to(torch.uint8), bits)
