"""Weights in floating point of few bits: block scales, rounding to nearest, and neighbours to choose from by training.

Scales of a group of neighbours in a row, ``m`` its largest magnitude and ``F`` the format's largest value:

    e8m0   2^(floor(log2 m) - exponent of F), a power of two; what it leaves beyond F becomes F (OCP MX 1.0, 6.3)
    fp16   m / F, rounded to half precision
    e4m3   m / F in multiples of a number for the whole matrix, rounded to FP8 E4M3 (NVFP4's two-level scales)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import fx

from xformopt.kernels.float_formats import FORMATS, pack_floats, round_float, scale_values
from xformopt.reconstruction import Rounding
from xformopt.rewrite import Editor

__all__ = ["FloatGrid", "PackedFloats", "ScaleKind", "fit_float_grid"]

ScaleKind: TypeAlias = Literal["e8m0", "fp16", "e4m3"]

_E8M0_BIAS, _E8M0_ENDS = 127, (-127, 127)
_SCALE_FORMAT = FORMATS["fp8_e4m3"]
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class PackedFloats:
    """A matrix as stored: ``weight`` uint8 ``[O, G, bytes]``, ``scale`` ``[O, G]``, ``base`` a scalar or None."""

    weight: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor | None

    def parameters(self, editor: Editor, name: str) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Return the nodes that read codes, scales and the scales' base, stored under ``name``."""
        weight = editor.parameter(f"{name}.codes", self.weight)
        scale = editor.parameter(f"{name}.scale", self.scale)
        return weight, scale, None if self.base is None else editor.parameter(f"{name}.base", self.base)


@dataclass(frozen=True)
class FloatGrid:
    """The values that the weights of a matrix can take.

    Attributes:
        format: One of ``FORMATS``.
        scale: As stored, ``[O, G]``.
        base: What scales in E4M3 are multiples of, a scalar.

    """

    format: str
    scale: torch.Tensor
    base: torch.Tensor | None

    def nearest(self, weight: torch.Tensor) -> PackedFloats:
        """Return the nearest codes of a matrix ``[O, I]``, halves to even."""
        values, codes = self._table(weight)
        rounded = round_float(self._relative(weight), self.format)
        return self._packed(codes[torch.searchsorted(values, rounded)])

    def variable(self, weight: torch.Tensor) -> Rounding:
        """Return the trained choice between the neighbours of each weight ``[O, I]``."""
        values, _ = self._table(weight)
        below = self._below(weight)
        step = scale_values(self.scale, self.base, weight).unsqueeze(2)
        low, high = ((values[place] * step).reshape(weight.shape) for place in (below, below + 1))
        return Rounding(weight, low, high)

    def packed(self, weight: torch.Tensor, up: torch.Tensor) -> PackedFloats:
        """Return the codes of ``weight``, those of the upper neighbours where ``up`` is 1."""
        _, codes = self._table(weight)
        return self._packed(codes[self._below(weight) + up.reshape(*self.scale.shape, -1)])

    def _table(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the finite values in ascending order, zero once, and their codes."""
        values = FORMATS[self.format].table(like)
        usable = values.isfinite() & ~((values == 0) & values.signbit())
        codes = usable.nonzero().flatten()
        order = values[codes].argsort()
        return values[codes][order], codes[order].to(torch.uint8)

    def _relative(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights in multiples of their scales, ``[O, G, I / G]``."""
        grouped = weight.reshape(*self.scale.shape, -1)
        return grouped / scale_values(self.scale, self.base, weight).unsqueeze(2)

    def _below(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the place of each weight's lower neighbour in the table."""
        values, _ = self._table(weight)
        found = torch.searchsorted(values, self._relative(weight).contiguous(), right=True) - 1
        return found.clamp(0, len(values) - 2)

    def _packed(self, codes: torch.Tensor) -> PackedFloats:
        return PackedFloats(pack_floats(codes, FORMATS[self.format].bits).contiguous(), self.scale, self.base)


def fit_float_grid(weight: torch.Tensor, *, format: str, kind: ScaleKind, group: int) -> FloatGrid:
    """Choose the scales of a matrix ``[O, I]``, one for every ``group`` neighbours in a row; of zeros it is 1."""
    rows, columns = weight.shape
    size = weight.reshape(rows, columns // group, group).abs().amax(2)
    found = FORMATS[format]
    if kind == "e8m0":
        exponent = torch.frexp(size).exponent - 1 - found.largest_exponent
        codes = torch.where(size > 0, exponent.clamp(*_E8M0_ENDS), 0) + _E8M0_BIAS
        return FloatGrid(format, codes.to(torch.uint8), None)
    scale = torch.where(size > 0, size / found.largest, torch.ones_like(size))
    if kind == "fp16":
        return FloatGrid(format, scale.clamp(_HALF.smallest_normal, _HALF.max).half(), None)
    base = scale.amax() / _SCALE_FORMAT.largest
    ratio = round_float(scale / base, _SCALE_FORMAT.name)
    # codes of positive numbers ascend with them; no scale may be zero
    positive = torch.tensor(_SCALE_FORMAT.values[: 2 ** (_SCALE_FORMAT.bits - 1) - _SCALE_FORMAT.unused])
    codes = torch.searchsorted(positive.to(ratio.dtype), ratio).clamp(min=1)
    return FloatGrid(format, codes.to(torch.uint8), base)
