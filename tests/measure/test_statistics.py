"""Intervals and ratios, against brute force and known cases."""

from __future__ import annotations

import numpy as np
import pytest

from xformopt.errors import MeasurementError
from xformopt.measure.statistics import (
    Interval,
    Ratio,
    _draws,
    _resampled_medians,
    median_interval,
    percentiles,
    ratio_of_medians,
)


def rounds(generator: np.random.Generator, count: int, size: int, center: float) -> list[list[float]]:
    drift = generator.normal(0, 0.2, count)
    return [list(center + shift + generator.normal(0, 0.05, size)) for shift in drift]


def test_resampled_medians_are_those_of_the_drawn_rounds() -> None:
    generator = np.random.default_rng(1)
    groups = [generator.normal(size=size) for size in (1, 4, 7, 2, 3)]
    draws = _draws(len(groups), 300, seed=0)
    wanted = [
        np.median(np.concatenate([np.tile(group, times) for group, times in zip(groups, draw, strict=True)]))
        for draw in draws
    ]
    np.testing.assert_allclose(_resampled_medians(groups, draws), wanted, rtol=1e-12)


def test_percentiles_are_interpolated() -> None:
    found = percentiles([float(value) for value in range(101)])
    assert (found.p50, found.p90, found.p99) == (50.0, 90.0, 99.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    covered = sum(
        10.0 in (median_interval(rounds(generator, 20, 5, 10.0), resamples=400) or Interval(0, 0)) for _ in range(200)
    )
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_cancels_what_slows_both_sides() -> None:
    generator = np.random.default_rng(3)
    load = 1 + generator.uniform(0, 1, 30)
    baseline = [[2.0 * factor] * 3 for factor in load]
    faster = [[1.0 * factor] * 3 for factor in load]
    ratio = ratio_of_medians(baseline, faster)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.interval is not None
    assert ratio.interval.high - ratio.interval.low < 1e-9
    assert ratio.is_difference


def test_noise_is_no_difference() -> None:
    generator = np.random.default_rng(4)
    same = [ratio_of_medians(rounds(generator, 20, 5, 10.0), rounds(generator, 20, 5, 10.0)) for _ in range(50)]
    assert sum(ratio.is_difference for ratio in same) <= 6


def test_the_same_seed_gives_the_same_interval() -> None:
    samples = rounds(np.random.default_rng(5), 10, 3, 1.0)
    assert median_interval(samples, seed=7) == median_interval(samples, seed=7)


def test_few_rounds_give_an_interval_as_wide_as_their_range() -> None:
    interval = median_interval([[1.0, 1.0], [5.0], [1.1]])
    assert interval is not None
    assert interval.low <= 1.0
    assert interval.high >= 5.0


def test_one_round_draws_its_samples_and_one_sample_claims_nothing() -> None:
    assert median_interval([[1.0, 2.0, 3.0]]) == Interval(1.0, 3.0)
    assert median_interval([[1.0]]) is None
    alone = ratio_of_medians([[4.0]], [[1.0]])
    assert alone == Ratio(4.0, None)
    assert not alone.is_difference


@pytest.mark.parametrize("samples", [[], [[]], [[1.0], []]])
def test_no_samples(samples: list[list[float]]) -> None:
    with pytest.raises(MeasurementError, match="at least one round"):
        median_interval(samples)
    with pytest.raises(MeasurementError, match="no samples"):
        percentiles([])
