"""Forecasting a system of eight coupled series with a daily and a weekly rhythm, drawn from a seed.

The data is made, not measured.  Steps are hours; two hidden drivers follow slow autoregressions, and one of them
modulates how strongly the daily rhythm shows; every series mixes both rhythms at a phase of its own, follows its
neighbour's last value (so that they are coupled), and carries noise.  The rhythms are what a seasonal-naive forecast
repeats; how far their strength has drifted since is what a model can do better, and the noise is what no forecast can
know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from xformopt.models.tasks.task import Batch, Task

__all__ = ["HISTORY", "HORIZON", "VARIABLES", "Forecast", "system", "training_windows", "windows"]

HISTORY, HORIZON, VARIABLES = 336, 96, 8
DAY, WEEK = 24, 168
_STEPS, _TRAINING_STEPS = 12_000, 9_000
_TEST_WINDOWS, _CALIBRATION_WINDOWS, _BATCH = 240, 64, 24
_VALIDATION_WINDOWS = 96
_SEED, _VALIDATION_SEED = 0, 1


@cache
def system(steps: int = _STEPS, seed: int = _SEED) -> torch.Tensor:
    """Return ``[steps, VARIABLES]`` float32, each series of mean 0 and deviation 1 over the training part."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, VARIABLES + 2, generator=generator, dtype=torch.float64)
    phases = torch.rand(2, VARIABLES, generator=generator, dtype=torch.float64) * 2 * math.pi
    shares = 0.5 + torch.rand(2, VARIABLES, generator=generator, dtype=torch.float64)
    hours = torch.arange(steps, dtype=torch.float64)[:, None]
    daily = torch.sin(hours * (2 * math.pi / DAY) + phases[0]) + 0.5 * torch.sin(
        hours * (4 * math.pi / DAY) + phases[1]
    )
    weekly = torch.sin(hours * (2 * math.pi / WEEK) + phases[1])
    # remembered for about 200 and 100 steps, both of deviation 1
    memory, renewal = torch.tensor([[0.995, 0.99], [0.1, 0.14]], dtype=torch.float64)
    drivers = torch.zeros(2, dtype=torch.float64)
    state = torch.zeros(VARIABLES, dtype=torch.float64)
    rows = []
    for step in range(steps):
        drivers = memory * drivers + renewal * noise[step, VARIABLES:]
        strength = 1 + 0.5 * torch.tanh(drivers[0])
        pushed = shares[0] * strength * daily[step] + shares[1] * weekly[step] + 0.2 * drivers[1]
        state = 0.5 * state + 0.2 * state.roll(1) + 0.3 * pushed + 0.1 * noise[step, :VARIABLES]
        rows.append(state)
    series = torch.stack(rows)
    trained = series[:_TRAINING_STEPS]
    return ((series - trained.mean(0)) / trained.std(0)).float()


def windows(starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the histories ``[N, HISTORY, V]`` that begin at ``starts`` and what follows them, ``[N, HORIZON, V]``."""
    found = system()[starts[:, None] + torch.arange(HISTORY + HORIZON)]
    return found[:, :HISTORY], found[:, HISTORY:]


def training_windows(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows that lie wholly in the training part."""
    return windows(torch.randint(_TRAINING_STEPS - HISTORY - HORIZON, (count,), generator=generator))


@dataclass(frozen=True)
class Forecast(Task):
    """Mean squared error of the next 96 steps of eight series, given 336; each series has variance 1.

    An item is a window; its histories and futures all lie after the part that is trained on.
    """

    name: ClassVar[str] = "forecast"
    summary: ClassVar[str] = "the next 96 steps of eight coupled series with two rhythms (generated)"
    metric: ClassVar[str] = "mean squared error"
    higher_is_better: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("series",)
    output: ClassVar[str] = "forecast"

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return histories of the training part."""
        histories, _ = training_windows(self.samples or _CALIBRATION_WINDOWS, torch.Generator().manual_seed(_SEED))
        return [{"series": part} for part in histories.split(_BATCH)]

    def test(self) -> Iterator[Batch]:
        """Yield windows at equal distances over the part that is held out."""
        last = _STEPS - HISTORY - HORIZON
        histories, futures = windows(torch.linspace(_TRAINING_STEPS, last, _TEST_WINDOWS, dtype=torch.float64).long())
        for history, future in zip(histories.split(_BATCH), futures.split(_BATCH), strict=True):
            yield Batch({"series": history}, {"future": future})

    def validation(self) -> Iterator[Batch]:
        """Yield other windows of the training part."""
        histories, futures = training_windows(_VALIDATION_WINDOWS, torch.Generator().manual_seed(_VALIDATION_SEED))
        for history, future in zip(histories.split(_BATCH), futures.split(_BATCH), strict=True):
            yield Batch({"series": history}, {"future": future})

    def judge(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean squared error of each window."""
        return (output.double() - batch.targets["future"].double()).square().mean((1, 2)), None

    def baselines(self) -> dict[str, float]:
        """Return the error of repeating the last day, the last week, the last value, and of forecasting the mean, 0."""
        return {
            "last week again": self._naive(WEEK),
            "last day again": self._naive(DAY),
            "last value": self._naive(1),
            "mean": float(torch.cat([batch.targets["future"].square().mean((1, 2)) for batch in self.test()]).mean()),
        }

    def _naive(self, period: int) -> float:
        """Return the error of repeating the last ``period`` steps over the horizon."""
        repeated = HISTORY - period + torch.arange(HORIZON) % period
        return self.evaluate(lambda inputs: {"forecast": inputs["series"][:, repeated]}).value
