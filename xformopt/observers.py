"""Ranges of activations, found on calibration data in bounded memory.

Every observer begins with the smallest and largest value; all but ``min-max`` then count the values in bins between the
two, in a second run over the data, and choose a narrower range:

    percentile   as many of the smallest and of the largest values are left out as asked for
    mse          the squared error of the quantized values is least
    entropy      the quantized values' distribution is nearest to the original one (Kullback-Leibler divergence), with
                 what lies outside counted at the ends (Migacz, "8-bit inference with TensorRT", GTC 2017)

``mse`` and ``entropy`` try shrunken copies of the full range, which keep its ratio of low to high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.program import Program, interpret, path_of, valid_positions

__all__ = [
    "Granularity",
    "Method",
    "Moments",
    "Range",
    "affine_parameters",
    "narrow",
    "observe_moments",
    "observe_ranges",
    "rows_of",
]

Method: TypeAlias = Literal["min-max", "percentile", "mse", "entropy"]
# what shares one range: everything, each entry of the last axis, groups of its neighbours, or each position
Granularity: TypeAlias = Literal["tensor", "channel", "group", "token"]

BINS = 2048
CANDIDATES = 100
# probabilities of an empty bin where the divergence divides by them
_ABSENT = 1e-4


@dataclass(frozen=True)
class Range:
    """The ends of the ranges of ``R`` rows, float64 ``[R]``."""

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True)
class Moments(Range):
    """The ends of the ranges of ``R`` rows and the mean of their squares, float64 ``[R]``."""

    mean_square: torch.Tensor


def affine_parameters(found: Range, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale (float32) and zero point (uint8) of unsigned codes, the range widened to hold zero, both ``[R]``."""
    low, high = found.low.clamp(max=0), found.high.clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale.double()).round().clamp(0, 2**bits - 1)
    return scale, zero.to(torch.uint8)


def rows_of(value: torch.Tensor, granularity: Granularity, group: int = 0) -> torch.Tensor:
    """Return the values that share a range as rows, ``[R, N]``."""
    width = value.shape[-1]
    if granularity == "tensor":
        return value.reshape(1, -1)
    if granularity == "token":
        return value.reshape(-1, width)
    if granularity == "channel":
        return value.reshape(-1, width).t()
    if group < 1 or width % group:
        raise DataError(f"Groups of {group} do not divide the {width} channels. Choose a divisor of {width}.")
    return value.reshape(-1, width // group, group).transpose(0, 1).reshape(width // group, -1)


def observe_ranges(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    names: Iterable[str],
    *,
    method: Method = "min-max",
    granularity: Granularity = "tensor",
    group: int = 0,
    percentile: float = 99.99,
    bits: int = 8,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Range]:
    """Run ``program`` on calibration batches and return the range of each value in ``names``.

    Padding does not count.  Memory: two numbers for each row, and ``BINS`` counts where bins are needed.

    Args:
        program: What to run.
        batches: Named inputs, at least one batch.
        names: Of the graph's values to look at.
        method: How a range is chosen.
        granularity: What shares a range.
        group: Channels in a group.
        percentile: The share of values, in percent, that ``percentile`` keeps.
        bits: Of the codes that ``mse`` and ``entropy`` choose for.
        progress: Called with (what, done, total).

    Raises:
        DataError: no batches, a value that is not finite, or rows that differ in number between batches.

    """
    collectors = {name: _Collector(granularity, group) for name in names}
    _collect(program, batches, collectors, runs=1 if method == "min-max" else 2, progress=progress)
    if method == "min-max":
        return {name: found.ends for name, found in collectors.items()}
    return {
        name: narrow(found.ends, found.counts, method=method, percentile=percentile, bits=bits)
        for name, found in collectors.items()
    }


def observe_moments(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    names: Iterable[str],
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Moments]:
    """Like :func:`observe_ranges` by min-max for each channel, with the mean of the squares beside the ends."""
    collectors = {name: _Collector("channel", 0) for name in names}
    _collect(program, batches, collectors, runs=1, progress=progress)
    return {
        name: Moments(found.ends.low, found.ends.high, found.squares / found.seen) for name, found in collectors.items()
    }


def _collect(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    collectors: Mapping[str, _Collector],
    *,
    runs: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Run the program on all batches: once for the ends, and where asked for once more for the counts."""
    if not batches:
        raise DataError(
            "Ranges of activations are found on calibration data, and there is none. Give some with --calibration "
            "(or calibration=... in Python)."
        )
    for run in range(runs):
        for index, batch in enumerate(batches):
            progress("calibrating", run * len(batches) + index, runs * len(batches))
            interpret(program, batch, observe=_watch(program, batch, collectors, counting=run == 1))


def _watch(
    program: Program, batch: Mapping[str, torch.Tensor], collectors: Mapping[str, _Collector], *, counting: bool
) -> Callable[[fx.Node, Any], None]:
    def observe(node: fx.Node, value: Any) -> None:
        if (collector := collectors.get(node.name)) is None:
            return
        valid = valid_positions(program, node.meta["val"], batch) if collector.granularity != "token" else None
        if valid is not None and valid.shape[-1] == 1:
            value = value[valid.expand(*value.shape[:-1], 1).squeeze(-1)]
        collector.take(value, counting, path_of(node) or f"%{node.name}")

    return observe


@dataclass
class _Collector:
    """What is remembered of one value: ends and squares of its rows, then how many values lie in each bin."""

    granularity: Granularity
    group: int
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    seen: int = 0
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def ends(self) -> Range:
        assert self.low is not None
        assert self.high is not None
        return Range(self.low, self.high)

    def take(self, value: torch.Tensor, counting: bool, path: str) -> None:
        if not value.numel():
            return
        rows = rows_of(value, self.granularity, self.group).double()
        if counting:
            self._count(rows)
            return
        if not bool(rows.isfinite().all()):
            raise DataError(
                f"On the calibration data, {path} computes {int((~rows.isfinite()).sum())} values that are NaN or "
                f"infinite, so it has no range. Look for the cause in the data or the model."
            )
        low, high = rows.amin(1), rows.amax(1)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        if low.shape != self.low.shape:
            raise DataError(
                f"A range for each {self.granularity} of {path} needs calibration inputs of one size: "
                f"{len(self.low)} rows in one batch, {len(low)} in another."
            )
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.squares = self.squares + rows.square().sum(1)
        self.seen += rows.shape[1]

    def _count(self, rows: torch.Tensor) -> None:
        ends = self.ends
        width = (ends.high - ends.low).clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
        bins = ((rows - ends.low.unsqueeze(1)) / width * BINS).floor().clamp(0, BINS - 1).long()
        bins += torch.arange(len(rows)).unsqueeze(1) * BINS
        found = torch.bincount(bins.flatten(), minlength=len(rows) * BINS).view(len(rows), BINS)
        self.counts = found if not self.counts.numel() else self.counts + found


def narrow(ends: Range, counts: torch.Tensor, *, method: Method, percentile: float = 99.99, bits: int = 8) -> Range:
    """Choose ranges within ``ends``.

    Args:
        ends: The smallest and largest value of each row.
        counts: How many values lie in each of the equal bins between, ``[R, BINS]``.
        method: All but ``min-max``.
        percentile: See :func:`observe_ranges`.
        bits: See :func:`observe_ranges`.

    """
    if method == "percentile":
        chosen = [_percentile(*row, percentile) for row in zip(ends.low, ends.high, counts, strict=True)]
    else:
        loss = _squared_error if method == "mse" else _divergence
        chosen = [_shrunken(*row, loss, bits) for row in zip(ends.low, ends.high, counts, strict=True)]
    low, high = (torch.stack(part) for part in zip(*chosen, strict=True))
    return Range(low, high)


_Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def _percentile(low: torch.Tensor, high: torch.Tensor, counts: torch.Tensor, percentile: float) -> _Pair:
    """Leave out half of the rest at either end, in whole bins."""
    tail = counts.sum() * (100 - percentile) / 200
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0)
    width = (high - low) / len(counts)
    return low + width * (below <= tail).sum(), high - width * (above <= tail).sum()


def _shrunken(
    low: torch.Tensor, high: torch.Tensor, counts: torch.Tensor, loss: Callable[..., torch.Tensor], bits: int
) -> _Pair:
    """Return the shrunken range of least loss; of equal ones the widest."""
    width = (high - low) / len(counts)
    centers = low + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
    best: tuple[float, _Pair] | None = None
    for step in range(CANDIDATES, CANDIDATES // 10, -1):
        ends = (low * step / CANDIDATES, high * step / CANDIDATES)
        scale, zero = affine_parameters(Range(ends[0].view(1), ends[1].view(1)), bits)
        codes = ((centers / scale.double()).round() + zero).clamp(0, 2**bits - 1).long()
        found = float(loss(centers, counts.double(), codes, scale.double(), zero.double()))
        if best is None or found < best[0]:
            best = (found, ends)
    assert best is not None
    return best[1]


def _squared_error(
    centers: torch.Tensor, counts: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    return ((centers - (codes - zero) * scale).square() * counts).sum()


def _divergence(
    centers: torch.Tensor, counts: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Return KL(P || Q): P has what is clipped in its end bins, Q spreads each code's values over its full bins."""
    within = ((centers / scale).round() + zero - codes).abs() < 0.5
    kept = torch.where(within, counts, 0.0)
    inside = within.nonzero().flatten()
    if not len(inside):
        return torch.tensor(float("inf"))
    original = kept.clone()
    first, last = int(inside[0]), int(inside[-1])
    original[first] += counts[:first].sum()
    original[last] += counts[last + 1 :].sum()
    levels = int(codes.max()) + 1
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, kept)
    full = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, (kept > 0).double())
    spread = torch.where(kept > 0, (total / full.clamp(min=1))[codes], 0.0)
    p, q = original / original.sum(), spread / spread.sum().clamp(min=1)
    return torch.where(p > 0, p * (p / q.clamp(min=_ABSENT / len(p))).log(), 0.0).sum()
