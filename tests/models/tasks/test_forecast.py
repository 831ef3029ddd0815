"""Forecasting: the system is reproducible, and training never sees what is tested."""

from __future__ import annotations

import pytest
import torch

from xformopt.models.tasks import forecast
from xformopt.models.tasks.forecast import HISTORY, HORIZON, VARIABLES, Forecast, system, training_windows


def test_the_system_is_scaled_and_reproducible() -> None:
    series = system()
    trained = series[: forecast._TRAINING_STEPS]
    torch.testing.assert_close(trained.mean(0), torch.zeros(VARIABLES), atol=1e-4, rtol=0)
    torch.testing.assert_close(trained.std(0), torch.ones(VARIABLES), atol=1e-4, rtol=0)
    assert torch.equal(system(steps=50), system(steps=50, seed=0))
    assert not torch.equal(system(steps=50), system(steps=50, seed=1))


def test_the_test_split_lies_after_the_training_part() -> None:
    first = next(Forecast().test())
    assert torch.equal(first.inputs["series"][0], system()[forecast._TRAINING_STEPS :][:HISTORY])
    histories, futures = training_windows(64, torch.Generator().manual_seed(0))
    assert histories.shape == (64, HISTORY, VARIABLES)
    assert futures.shape == (64, HORIZON, VARIABLES)


def test_the_error_of_forecasts_that_are_known() -> None:
    task = Forecast()
    batch = next(task.test())
    future = batch.targets["future"]
    assert float(task.judge(future, batch)[0].max()) == 0.0
    items, weights = task.judge(future + 0.5, batch)
    assert weights is None
    torch.testing.assert_close(items, torch.full((len(future),), 0.25, dtype=torch.float64))


def test_baselines() -> None:
    baselines = Forecast().baselines()
    # the weekly rhythm is real, so repeating the week beats repeating the day, which beats repeating one value
    assert baselines["last week again"] < baselines["last day again"] < baselines["last value"]
    assert baselines["mean"] == pytest.approx(1.0, abs=0.3)
    naive = torch.cat(
        [(b.inputs["series"][:, -168:-72] - b.targets["future"]).square().mean((1, 2)) for b in Forecast().test()]
    )
    assert baselines["last week again"] == pytest.approx(float(naive.mean()), rel=1e-5)
