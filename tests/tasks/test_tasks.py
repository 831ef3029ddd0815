"""Which task a user means, and what a fold may be judged on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from xformopt.errors import CaptureError, UsageError
from xformopt.models.tasks.digits import Digits
from xformopt.models.tasks.index import find_task_class, tasks
from xformopt.tasks import find_task, task_for

OWN = """
from dataclasses import dataclass
from typing import ClassVar

from xformopt.models.tasks.task import Task


@dataclass(frozen=True)
class Mine(Task):
    scale: float = 1.0
    name: ClassVar[str] = "mine"
    metric: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    output: ClassVar[str] = "y"

    def calibration(self): return []
    def test(self): return iter(())
    def judge(self, output, batch): return output, None


@dataclass(frozen=True)
class Unfinished(Task):
    name: ClassVar[str] = "unfinished"

    def calibration(self): return []
    def test(self): return iter(())


class Lacking(Mine):
    pass


del Mine.output
value = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_tasks.py").write_text(OWN)
    (tmp_path / "whole_tasks.py").write_text(OWN.replace("del Mine.output\n", ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_task_says_what_it_is() -> None:
    assert {"digits", "retrieval"} <= set(tasks())
    for name, kind in tasks().items():
        assert kind.name == name
        assert kind.summary
        assert kind.metric
        assert kind.inputs
        assert kind().fold == 0
        assert find_task_class(name) is kind


def test_options() -> None:
    assert find_task("digits{fold=2}") == Digits(2) == find_task("digits", fold=2)


def test_a_task_of_the_users_own(own: Path) -> None:
    task = find_task("whole_tasks:Mine{scale=2.5}")
    assert (task.name, task.scale) == ("mine", 2.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("digit", "Did you mean digits"),
        ("Retrival", "Did you mean retrieval"),
        ("zzz", "The tasks are: "),
        ("digits{", "is not a task"),
        ("digits{fold}", "write option=value"),
        ("digits{fold=x}", "refuses fold='x'"),
        ("digits{fold=7}", "fold must be 0 to 4"),
        ("digits{samples=0}", "samples must be at least 1"),
        ("digits{fould=1}", "Did you mean 'fold'"),
        ("own_tasks:Unfinished", "is no task"),
        ("own_tasks:Lacking", "lacks the class attribute 'output'"),
        ("pathlib:Path", "is no task"),
    ],
)
def test_tasks_that_are_none(written: str, message: str, own: Path) -> None:
    with pytest.raises(UsageError, match=message):
        find_task(written)


@pytest.mark.parametrize(
    ("written", "message"),
    [("absent_module:Mine", "no Python module"), ("own_tasks:Mime", "Did you mean"), ("own_tasks:value", "is a int")],
)
def test_modules_that_hold_none(written: str, message: str, own: Path) -> None:
    with pytest.raises(CaptureError, match=message):
        find_task(written)


def test_a_trained_model_is_judged_on_what_it_has_not_seen() -> None:
    assert task_for("digits", "digits-vit{fold=3}") == Digits(3)
    assert task_for("digits", "digits-vit") == Digits(0)
    assert task_for("digits{fold=3}", "digits-vit{fold=3}") == Digits(3)
    assert task_for("digits{fold=2}", "vit-tiny") == Digits(2)
    assert task_for(Digits(4), "something else") == Digits(4)
    for asked in ("digits{fold=1}", Digits(1)):
        with pytest.raises(UsageError, match=r"was trained on what fold 1 .* or take digits-vit\{fold=1\}"):
            task_for(asked, "digits-vit{fold=3}")


def test_a_task_of_another_name_may_have_any_fold() -> None:
    @dataclass(frozen=True)
    class Other(Digits):
        name = "other"

    assert task_for(Other(1), "digits-vit") == Other(1)


def test_as_much_calibration_data_as_is_asked_for() -> None:
    def items(written: str) -> list[int]:
        return [len(next(iter(batch.values()))) for batch in find_task(written).calibration()]

    assert sum(items("digits")) == 240
    assert sum(items("digits{samples=500}")) == 500
    # there are no more outside of the held-out fold
    assert sum(items("digits{samples=5000}")) == len(Digits().training()[0])
    assert sum(items("listops{samples=100}")) == 100
    once = items("recall")
    assert items("recall{samples=1}") == once
    assert items(f"recall{{samples={sum(once) + 1}}}") == 2 * once


@pytest.mark.parametrize("name", ["digits", "forecast", "listops", "recall"])
def test_validation_items_are_neither_tested_nor_calibration_data(name: str) -> None:
    def rows(batches: Iterable[Mapping[str, torch.Tensor]]) -> set[bytes]:
        return {row.numpy().tobytes() for batch in batches for row in batch[task.inputs[0]]}

    task = find_task(name)
    found = list(task.validation())
    assert sum(len(batch.inputs[task.inputs[0]]) for batch in found) >= 24
    # the answer to each is known
    assert all(batch.targets for batch in found)
    chosen = rows(batch.inputs for batch in found)
    assert not chosen & rows(batch.inputs for batch in task.test())
    assert not chosen & rows(task.calibration())


def test_what_calibration_takes_is_not_left_for_validation() -> None:
    assert sum(len(batch.inputs["pixel_values"]) for batch in Digits(samples=1400).validation()) == 37
    assert not list(Digits(samples=5000).validation())
