"""What the committed checkpoints of the sequence tasks reach, beside what their baselines do."""

from __future__ import annotations

import pytest

from xformopt.models.tasks import pycode
from xformopt.models.tasks.index import find_task_class
from xformopt.models.tasks.task import Score
from xformopt.models.zoo import find_trained


def score_of(name: str) -> Score:
    model = find_trained(name)
    module = model.build()
    return find_task_class(model.task)().evaluate(lambda inputs: module(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pycode-gpt", "pycode-llama"])
def test_pycode(name: str) -> None:
    score = score_of(name)
    # another patch release of Python has other modules: a little room, since the figures are of one of them
    known = pycode.held_out_digest() == pycode.MEASURED_DIGEST
    assert score.value <= (1.8 if known else 1.9)
    assert score.details["bits per byte on far repeats"] < score.value


@pytest.mark.slow
def test_recall_needs_reach() -> None:
    score = score_of("recall-llama")
    assert score.value >= 0.95
    # at every length, not only on average
    assert min(float(part.mean()) for part in score.items.split(1024)) >= 0.95
    assert score_of("recall-window").value < 0.2


@pytest.mark.slow
def test_forecast_beats_the_seasonal_naive_one() -> None:
    assert score_of("forecast-patchtst").value < find_task_class("forecast")().baselines()["last week again"]


@pytest.mark.slow
def test_listops_beats_every_baseline() -> None:
    score = score_of("listops-t5")
    assert score.value >= 0.5
    assert max(find_task_class("listops")().baselines().values()) < 0.4
