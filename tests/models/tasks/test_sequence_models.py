"""The models of the sequence tasks: their lessons, what they are trained on, and their shapes."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from xformopt.models.tasks import forecast_models, listops_models, pycode_models, recall_models
from xformopt.models.tasks.index import find_task_class
from xformopt.models.tasks.listops import draw, pad
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained

MODELS = [
    model for family in (forecast_models, listops_models, pycode_models, recall_models) for model in family.TRAINED
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_fresh_model_takes_its_task_and_learns(model: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    task = find_task_class(model.task)()
    module = model.fresh()
    inputs = {name: value[:2] for name, value in task.calibration()[0].items()}
    assert set(module.example_inputs()) == set(task.inputs)  # type: ignore[operator]
    assert module(**inputs)[task.output].isfinite().all()
    assert sum(parameter.numel() for parameter in module.parameters()) * 2 < 4_000_000
    family = next(f for f in (forecast_models, listops_models, pycode_models, recall_models) if model in f.TRAINED)
    monkeypatch.setattr(family, "_SCHEDULE", Schedule(steps=3, rate=1e-3, muon=True, cooldown=0.5, bfloat16=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    losses: list[str] = []
    train = model.train.func if isinstance(model.train, partial) else model.train
    train(module, 0, lambda what, done, total: losses.append(what))
    assert len(losses) == 3
    assert not module.training
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert any(not torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_answer_is_read_off_the_first_operator() -> None:
    module = listops_models._model().eval()
    source = random.Random(0)
    inputs, _ = pad([draw(source, 10, 40) for _ in range(3)])
    with torch.no_grad():
        assert isinstance(module, listops_models.ListEncoder)
        torch.testing.assert_close(module(**inputs)["logits"], module.every_value(**inputs)[:, 0])


def test_batches_of_expressions_keep_to_their_size() -> None:
    source = random.Random(0)
    drawn = [draw(source, 6, 128) for _ in range(60)]
    batches = listops_models._batches(drawn)
    assert sum(len(batch) for batch in batches) == len(drawn)
    assert all(len(batch) * max(len(e.tokens) for e in batch) <= listops_models._TOKENS for batch in batches)


def test_the_lessons_of_recall_end_in_the_task() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [recall_models._lesson(generator, done)[0].shape[1] for done in (0.0, 0.3, 0.5, *[0.9] * 20)]
    assert lengths[:3] == [16, 48, 128]
    assert set(lengths[3:]) == set(recall_models.LENGTHS)
    # the reach of both layers together ends before any answer
    assert min(recall_models.LENGTHS) * 0.75 - 2 * 8 > 2 * recall_models.WINDOW


def test_schedules() -> None:
    schedule = Schedule(steps=100, rate=1.0, warmup=0.1, cooldown=0.4)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:60] == [1.0] * 50
    assert factors[80] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 40)


def test_muon_moves_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    inputs = torch.randn(64, 8)

    def loss(module: torch.nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        return (module(inputs) - inputs).square().mean()

    with torch.no_grad():
        before = float(loss(module, torch.Generator(), 0.0))
    fit(module, loss, Schedule(steps=60, rate=3e-2, muon=True, cooldown=0.5), lambda what, done, total: None)
    assert float(loss(module, torch.Generator(), 0.0)) < before / 4
