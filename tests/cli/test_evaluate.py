"""Evaluating: models, artifacts and tasks of the user's own, and every way in which they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import xformopt as xo
from xformopt import api
from xformopt.evaluation import Evaluation, artifact_subject, judge, program_subject
from xformopt.measure.statistics import paired_difference
from xformopt.models.tasks.task import Score

Command = Callable[..., "object"]
Refused = Callable[..., str]
QUICK = ("--no-bench", "--no-measure")

# does the first word of a sequence come back as the sign of its first output?
OWN = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from xformopt.models.tasks.classification import Classification
from xformopt.models.tasks.task import Batch, Task


@dataclass(frozen=True)
class Signs(Task):
    batch: int = 3
    name: ClassVar[str] = "signs"
    summary: ClassVar[str] = "the sign of the first channel"
    metric: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("input_ids",)
    output: ClassVar[str] = "output_0"

    def ids(self):
        return torch.arange(40).reshape(8, 5) % 11

    def calibration(self):
        return [{"input_ids": self.ids()}]

    def test(self):
        return (Batch({"input_ids": rows}, {}) for rows in self.ids().split(self.batch))

    def judge(self, output, batch):
        return (output[:, 0, 0] > 0).double(), output.shape[1] * torch.arange(1, len(output) + 1)

    def baselines(self):
        return {"coin": 0.5}


class Chosen(Signs):
    def validation(self):
        yield Batch({"input_ids": self.ids()[:3]}, {})


class Errors(Chosen):
    higher_is_better: ClassVar[bool] = False


class Masked(Signs):
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")


class Pixels(Signs):
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)


class Logits(Signs):
    output: ClassVar[str] = "logits"


class Floats(Signs):
    def ids(self):
        return super().ids().float()
"""


@pytest.fixture
def own(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    (workplace / "own.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return workplace


def result(ended: object) -> dict[str, object]:
    assert ended.status == 0, ended.err  # type: ignore[attr-defined]
    found: dict[str, object] = json.loads(ended.out)  # type: ignore[attr-defined]
    return found


def expected() -> tuple[float, int]:
    """The value of the task for the tiny model, computed by hand."""
    import own
    import tiny

    task, model = own.Signs(), tiny.Tiny()
    scores, weights = [], []
    for batch in task.test():
        with torch.no_grad():
            output = model(**batch.inputs)
        scores += [float(value > 0) for value in output[:, 0, 0]]
        weights += [5.0 * (place + 1) for place in range(len(output))]
    return sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights), len(scores)


def test_a_model_and_its_artifact(command: Command, own: Path) -> None:
    found = result(command("evaluate", "tiny:Tiny", "--task", "own:Signs", "--json", "-"))
    value, count = expected()
    assert {"task", "metric", "value", "baseline", "count"} <= set(found)
    assert (found["task"], found["metric"], found["count"]) == ("signs", "share", count)
    assert found["value"] == found["baseline"] == pytest.approx(value)
    assert found["target"] == "eager"
    assert found["trivial"] == {"coin": 0.5}
    command("export", "tiny:Tiny", "-o", "out", "--no-measure")
    lowered = result(command("evaluate", "out", "--task", "own:Signs{batch=4}", "--json", "-"))
    assert lowered["target"] == "ort-cpu"
    assert (lowered["baseline"], lowered["difference_ci95"]) == (lowered["value"], [0.0, 0.0])
    shown = command("evaluate", "out", "--task", "own:Signs")
    assert "the original in eager mode" in shown.out  # type: ignore[attr-defined]


def test_a_model_on_a_target_it_is_lowered_to(command: Command, own: Path) -> None:
    words = ("evaluate", "tiny:Tiny", "--task", "own:Signs", "--target", "ort-cpu", "--json", "result.json")
    assert command(*words).status == 0  # type: ignore[attr-defined]
    found = json.loads((own / "result.json").read_text())
    assert (found["target"], found["value"]) == ("ort-cpu", found["baseline"])


def test_an_artifact_without_its_original(command: Command, own: Path) -> None:
    command("export", "tiny:Tiny", "-o", "out", "--no-measure", "--no-program")
    found = result(command("evaluate", "out", "--task", "own:Signs", "--json", "-"))
    assert found["baseline"] is None
    assert found["value"] == pytest.approx(expected()[0])


def test_optimize_reports_the_task(command: Command, own: Path) -> None:
    words = ("optimize", "tiny:Tiny", "-o", "out", *QUICK, "--task", "own:Signs", "--json", "o.json")
    ended = command(*words)
    assert ended.status == 0, ended.err  # type: ignore[attr-defined]
    assert "signs, 8 items" in ended.out  # type: ignore[attr-defined]
    found = json.loads((own / "o.json").read_text())["task"]
    assert (found["task"], found["count"], found["value"]) == ("signs", 8, found["baseline"])


def test_the_task_tells_passes_its_score(own: Path) -> None:
    import sys

    sys.path.insert(0, str(own))
    import own as tasks
    import tiny

    def notes(task: object) -> str:
        options = {"bench": False, "measure_lowering": False, "recipe": None, "passes": ["prune-by-score{tolerance=9}"]}
        done = api.optimize(tiny.Tiny(), task=task, **options)  # type: ignore[arg-type]
        (found,) = [record for record in done.result.history if record.name == "prune-by-score"]
        assert found.changed
        return found.notes[0]

    with torch.no_grad():
        output = tiny.Tiny()(tasks.Signs().ids()[:3])[:, 0, 0]
    value = float(((output > 0) * torch.arange(1, 4)).sum()) / 6
    assert f"judged by the task's score: {value:.4f} before" in notes(tasks.Chosen())
    # of a metric that is better the lower, the negative
    assert f"judged by the task's score: {-value:.4f} before" in notes(tasks.Errors())
    assert "agreement with the original's answers" in notes(tasks.Signs())


@pytest.mark.parametrize("words", [("evaluate", "tiny:Tiny"), ("optimize", "tiny:Tiny", "-o", "out", *QUICK)])
@pytest.mark.parametrize(
    ("task", "status", "message"),
    [
        ("digit", 2, "Did you mean digits"),
        ("own:Sines", 1, "Did you mean"),
        ("own:Masked", 1, "supplies the input 'attention_mask', and the model takes only input_ids"),
        ("own:Pixels", 1, "takes the input 'input_ids', and the task supplies only pixel_values"),
        ("own:Logits", 1, "judges the output 'logits': the model has only output_0"),
        ("own:Floats", 1, "does not fit"),
        ("retrieval", 1, "does not fit the task retrieval"),
    ],
)
def test_models_and_tasks_that_do_not_fit(
    words: tuple[str, ...], task: str, status: int, message: str, refused: Refused, own: Path
) -> None:
    said = refused(status, *words, "--task", task)
    assert message in said
    assert task != "own:Floats" or "input_ids must be i64[batch, length], but is f32[" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny:Tiny"], "No task is given. Name one with --task: digits"),
        (["--task", "digits"], "No model is given"),
        (["tiny:Tiny", "--task", "own:Signs", "--target", "ort-gpu"], 'Did you mean "ort-cpu"'),
        (["tiny:Tiny", "--task", "own:Signs", "--recipe", "exakt", "--target", "ort-cpu"], 'Did you mean "exact"'),
        (["digit-vit", "--task", "digits"], 'Did you mean "digits-vit"'),
        (["digits-vit{fold=9}", "--task", "digits"], "no fold 9: it has folds 0 to 4"),
        (["digits-vit", "--task", "digits{fold=1}"], "was trained on what fold 1"),
    ],
)
def test_wrong_usage(words: list[str], message: str, refused: Refused, own: Path) -> None:
    assert message in refused(2, "evaluate", *words)


def test_an_artifact_runs_where_it_was_made_for(command: Command, own: Path) -> None:
    command("export", "tiny:Tiny", "-o", "out", "--no-measure")
    ended = command("evaluate", "out", "--task", "own:Signs", "--target", "eager")
    assert ended.status == 2  # type: ignore[attr-defined]
    assert "was made for ort-cpu" in ended.err  # type: ignore[attr-defined]


def test_an_artifact_whose_inputs_do_not_fit(command: Command, own: Path) -> None:
    command("export", "tiny:Tiny", "-o", "out", "--no-measure")
    ended = command("evaluate", "out", "--task", "digits")
    assert ended.status == 1  # type: ignore[attr-defined]
    assert "takes the input 'input_ids', and the task supplies only pixel_values" in ended.err  # type: ignore[attr-defined]


def test_a_batch_that_is_fixed(own: Path) -> None:
    import sys

    sys.path.insert(0, str(own))
    import own as tasks
    import tiny

    free, model = tasks.Signs(), tiny.Tiny()
    fixed = xo.capture(model, {"input_ids": torch.ones(4, 5, dtype=torch.int64)}, dynamic={})
    assert fixed.inputs[0].shape == (4, 5)
    eager = program_subject(fixed, "fixed")
    artifact = xo.lower(fixed, measure=False)
    found = judge(free, artifact_subject(artifact), eager)
    assert found.score.items.tolist() == found.baseline.items.tolist()  # type: ignore[union-attr]
    assert found.score.value == pytest.approx(expected()[0])
    optimized = api.optimize(fixed, task=free, bench=False, measure_lowering=False)
    assert optimized.evaluation is not None
    assert optimized.evaluation.score.count == 8


def test_the_interval_of_a_difference() -> None:
    before, after = [1.0] * 90 + [0.0] * 10, [1.0] * 80 + [0.0] * 20
    interval = paired_difference(before, after)
    assert interval is not None
    # a binomial share of 0.1 among 100 has a deviation of 0.03
    assert -0.18 < interval.low < -0.13
    assert -0.07 < interval.high < -0.02
    assert paired_difference(before, before) == paired_difference(after, after)
    heavy = paired_difference([0.0, 0.0], [0.0, 1.0], [1.0, 3.0])
    assert heavy is not None
    assert (heavy.low, heavy.high) == (0.0, 1.0)
    assert paired_difference([1.0], [0.0]) is None


def test_models_are_listed(command: Command) -> None:
    listed = {each["name"]: each for each in result(command("models", "--json"))}  # type: ignore[index, call-overload]
    assert {"minilm", "vit-tiny", "digits-vit"} <= set(listed)
    vit = listed["digits-vit"]
    assert (vit["task"], vit["folds"], vit["inputs"]) == ("digits", 5, {"pixel_values": [2, 1, 32, 32]})
    assert all(each["sources"] for each in listed.values())
    # 8 layers of 4 * 64 * 64 + 2 * 64 * 128 weights on 65 tokens of two images, two operations each, and what is beside
    assert 2 * 2 * 65 * 8 * 8 * 64 * 64 < vit["flops"] < 1.4 * 2 * 2 * 65 * 8 * 8 * 64 * 64
    assert vit["parameters"] > 8 * 8 * 64 * 64
    assert "digits-vit" in command("models").out  # type: ignore[attr-defined]


def test_an_evaluation_without_pairs_has_no_interval() -> None:
    import xformopt.tasks

    task = xformopt.tasks.find_task("digits")
    score = Score(1.0, torch.ones(4))
    assert Evaluation(task, "eager", score, None).difference is None
    assert Evaluation(task, "eager", score, Score(1.0, torch.ones(3))).difference is None
