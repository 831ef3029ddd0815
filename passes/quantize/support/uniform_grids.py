"""Uniform grids for rounding that is trained: which two codes a weight lies between, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.match import operand
from xformopt.passes.quantize.support.quantization import GroupCodes, quantize_groups
from xformopt.reconstruction import Rounding

__all__ = ["UniformGrid", "fit_grid", "weights_of"]

# how far the range of a group is narrowed in search of the least squared error
_SHRUNKEN = tuple(step / 50 for step in range(50, 19, -2))


@dataclass(frozen=True)
class UniformGrid:
    """Equally spaced values ``(code - zero) scale``, one scale and zero for each group of neighbours in a row.

    Attributes:
        scale: ``[O, G]``.
        zero: Whole numbers in floating point, ``[O, G]``.
        bits: Of a code.
        symmetric: Whether every zero is the middle code.

    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    symmetric: bool

    def variable(self, weight: torch.Tensor) -> Rounding:
        """Return the trained choice between the neighbours of each weight ``[O, I]``."""
        low, high = self._neighbours(weight)
        return Rounding(weight, self._values(low), self._values(high))

    def codes(self, weight: torch.Tensor, up: torch.Tensor) -> GroupCodes:
        """Return the codes of ``weight``, rounded up where ``up`` is 1."""
        low, high = self._neighbours(weight)
        chosen = torch.where(up.bool(), high, low)
        return GroupCodes(
            chosen.to(torch.uint8), self.scale, None if self.symmetric else self.zero.to(torch.uint8), self.bits
        )

    def _neighbours(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grouped = weight.reshape(*self.scale.shape, -1)
        below = (grouped / self.scale.unsqueeze(2)).floor() + self.zero.unsqueeze(2)
        last = 2**self.bits - 1
        low, high = (codes.clamp(0, last).reshape(weight.shape) for codes in (below, below + 1))
        return low, high

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        grouped = codes.reshape(*self.scale.shape, -1)
        return ((grouped - self.zero.unsqueeze(2)) * self.scale.unsqueeze(2)).reshape(codes.shape)


def fit_grid(weight: torch.Tensor, *, bits: int, group: int, symmetric: bool, search: bool) -> UniformGrid:
    """Choose scales and zero points for a matrix ``[O, I]``.

    Args:
        weight: ``[O, I]``.
        bits: Of a code.
        group: Neighbours that share a scale; divides I.
        symmetric: Whether zero is the middle code.
        search: Narrow each group's range to where the squared error of rounding to nearest is least; otherwise the
            range is that of its weights.

    """
    rows, columns = weight.shape
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least = weight.new_full((rows, columns // group), float("inf"))
    grouped = weight.reshape(rows, columns // group, group)
    for share in _SHRUNKEN if search else (1.0,):
        low, high = grouped.amin(2, keepdim=True) * share, grouped.amax(2, keepdim=True) * share
        ends = grouped.clamp(low, high).reshape(weight.shape)
        found = quantize_groups(ends, bits=bits, group=group, symmetric=symmetric)
        zero = torch.full_like(found.scale, 2 ** (bits - 1)) if found.zero is None else found.zero.to(weight.dtype)
        scale, shift = found.scale.unsqueeze(2), zero.unsqueeze(2)
        codes = ((grouped / scale).round() + shift).clamp(0, 2**bits - 1)
        error = ((codes - shift) * scale - grouped).square().sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best = (found.scale, zero) if best is None else _chosen(better, (found.scale, zero), best)
    assert best is not None
    return UniformGrid(*best, bits, symmetric)


def _chosen(
    better: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor], old: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1])


def weights_of(layers: Sequence[fx.Node], is_fit: Callable[[fx.Node], bool]) -> list[str]:
    """Return the names of weights to round by training: those that fit, and that nothing else reads."""
    alone = [node for node in layers if len(operand(node, 1).users) == 1]
    return [str(operand(node, 1).target) for node in alone if is_fit(node)]
