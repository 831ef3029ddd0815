"""Owns what is claimed from samples: percentiles, intervals of medians, speed-ups that may be no difference.

Samples of one round share the state of the machine, so rounds, not samples, are what the bootstrap draws
(a cluster bootstrap); a speed-up draws the same rounds for both sides, so a slow phase cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xformopt.errors import MeasurementError

__all__ = [
    "Interval",
    "Percentiles",
    "Ratio",
    "median_interval",
    "paired_difference",
    "percentiles",
    "ratio_of_medians",
]

Rounds = Sequence[Sequence[float]]

_CHUNK = 128
# below this the bootstrap is too narrow; the range of n medians covers the truth with 1 - 2**(1 - n)
_FEW_ROUNDS = 6


@dataclass(frozen=True)
class Percentiles:
    """The usual three, in the unit of the samples."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Ratio:
    """How many times faster one side is; `interval` is None where the samples are too few to tell."""

    value: float
    interval: Interval | None

    @property
    def is_difference(self) -> bool:
        """Whether the two sides differ: the interval is known and does not include 1."""
        return self.interval is not None and 1.0 not in self.interval


def percentiles(samples: Sequence[float]) -> Percentiles:
    """Return p50, p90 and p99 of one or more samples, interpolated linearly."""
    if not len(samples):
        raise MeasurementError("percentiles of no samples: at least one measured run is needed.")
    p50, p90, p99 = np.percentile(np.asarray(samples, dtype=np.float64), (50, 90, 99))
    return Percentiles(float(p50), float(p90), float(p99))


def median_interval(
    rounds: Rounds, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Return the bootstrap interval of the median over all samples, or None for a single sample."""
    groups = _groups(rounds)
    if len(groups) < 2:
        return None
    medians = _resampled_medians(groups, _draws(len(groups), resamples, seed))
    return _interval(medians, np.array([np.median(group) for group in groups]), confidence)


def ratio_of_medians(
    baseline: Rounds, rounds: Rounds, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Return the speed-up over `baseline`, its median divided by ours, with a paired bootstrap interval.

    Args:
        baseline: Samples of the side compared with, by round.
        rounds: Samples of the other side, by round; round `i` ran beside round `i` of the baseline.
        confidence: How often the interval covers the truth.
        resamples: How many times rounds are drawn.
        seed: Of the draws; the same samples and seed give the same interval.

    """
    value = float(np.median(np.concatenate(baseline)) / np.median(np.concatenate(rounds)))
    before, after = _groups(baseline), _groups(rounds)
    paired = min(len(before), len(after))
    if paired < 2:
        return Ratio(value, None)
    before, after = before[:paired], after[:paired]
    draws = _draws(paired, resamples, seed)
    ratios = _resampled_medians(before, draws) / _resampled_medians(after, draws)
    by_round = np.array([np.median(b) / np.median(a) for b, a in zip(before, after, strict=True)])
    return Ratio(value, _interval(ratios, by_round, confidence))


def paired_difference(
    baseline: Sequence[float],
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the bootstrap interval of the difference between two means over the same items, or None for one item.

    Args:
        baseline: What is subtracted, by item.
        values: What it is subtracted from; item ``i`` is that of the baseline.
        weights: What each item counts; None: the same.
        confidence: How often the interval covers the truth.
        resamples: How many times items are drawn.
        seed: Of the draws.

    """
    if len(values) < 2:
        return None
    counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    differences = (np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)) * counts
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK):
        draws = _draws(len(values), min(_CHUNK, resamples - start), seed + start)
        means[start : start + _CHUNK] = (draws @ differences) / (draws @ counts)
    tail = (1 - confidence) / 2
    low, high = (float(edge) for edge in np.quantile(means, (tail, 1 - tail)))
    return Interval(low, high)


def _groups(rounds: Rounds) -> list[npt.NDArray[np.float64]]:
    groups = [np.asarray(samples, dtype=np.float64) for samples in rounds]
    if not groups or any(group.size == 0 for group in groups):
        raise MeasurementError("an interval needs at least one round, and a sample in every round.")
    if len(groups) == 1:
        # within one round there is nothing better to draw than its samples
        return list(groups[0].reshape(-1, 1))
    return groups


def _draws(count: int, resamples: int, seed: int) -> npt.NDArray[np.int32]:
    """Return how often each of `count` rounds is drawn in each resample, `[resamples, count]`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.int32)


def _resampled_medians(
    groups: Sequence[npt.NDArray[np.float64]], draws: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Return the median of the drawn rounds' samples, for every row of `draws`."""
    values = np.concatenate(groups)
    owner = np.repeat(np.arange(len(groups)), [group.size for group in groups])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    medians = np.empty(len(draws))
    for start in range(0, len(draws), _CHUNK):
        seen = np.cumsum(draws[start : start + _CHUNK][:, owner], axis=1, dtype=np.int32)
        twice, total = 2 * seen, seen[:, -1:]
        lower, upper = (twice >= total).argmax(axis=1), (twice > total).argmax(axis=1)
        medians[start : start + _CHUNK] = (values[lower] + values[upper]) / 2
    return medians


def _interval(resampled: npt.NDArray[np.float64], by_round: npt.NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = (float(edge) for edge in np.quantile(resampled, (tail, 1 - tail)))
    if len(by_round) < _FEW_ROUNDS:
        low, high = min(low, float(by_round.min())), max(high, float(by_round.max()))
    return Interval(low, high)
