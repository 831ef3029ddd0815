"""Judging on a task whatever runs a model: what a Program or an artifact reaches, and its original beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xformopt.comparison import BASELINES, check_target
from xformopt.errors import DataError, UsageError
from xformopt.inspection import passes_of
from xformopt.lineup import open_artifact
from xformopt.measure.statistics import Interval, paired_difference
from xformopt.models.tasks.task import Progress, Run, Score, Task, Tensors
from xformopt.original import Model, Original, capture_original
from xformopt.program import Program
from xformopt.tasks import task_for

if TYPE_CHECKING:
    from xformopt.lowering.artifact import Artifact

__all__ = [
    "Evaluation",
    "Subject",
    "artifact_subject",
    "calibration_of",
    "check_fit",
    "evaluate",
    "judge",
    "program_subject",
    "score_of",
]


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Subject:
    """Something that runs a model.

    Attributes:
        name: What to call it in messages.
        target: Where it runs.
        inputs: The shape of each input: sizes, and names of sizes that vary.
        outputs: The names of the outputs.
        run: Runs it.

    """

    name: str
    target: str
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    run: Run

    @property
    def rows(self) -> int | None:
        """The batch it is made for, where that is fixed."""
        firsts = {shape[0] for shape in self.inputs.values() if shape}
        first = firsts.pop() if len(firsts) == 1 else None
        return first if isinstance(first, int) else None


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on a task.

    Attributes:
        task: What it was judged on.
        target: Where the model ran.
        score: What it reached.
        baseline: What its original reached in eager mode; None where the original is not known.

    """

    task: Task
    target: str
    score: Score
    baseline: Score | None

    @property
    def difference(self) -> Interval | None:
        """The interval of the difference to the original, by items drawn in pairs; None where it cannot be told."""
        if self.baseline is None or self.baseline.count != self.score.count:
            return None
        weights = None if self.score.weights is None else self.score.weights.tolist()
        return paired_difference(self.baseline.items.tolist(), self.score.items.tolist(), weights)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of ``evaluate --json``."""
        interval = self.difference
        return {
            "task": self.task.name,
            "metric": self.task.metric,
            "value": self.score.value,
            "baseline": self.baseline.value if self.baseline else None,
            "count": self.score.count,
            "fold": self.task.fold,
            "target": self.target,
            "higher_is_better": self.task.higher_is_better,
            "difference_ci95": [interval.low, interval.high] if interval else None,
            "details": self.score.details,
            "trivial": self.task.baselines(),
        }


def evaluate(
    model: Artifact | Model,
    task: str | Task,
    *,
    target: str | None = None,
    recipe: str | Path | None = "exact",
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = _silent,
) -> Evaluation:
    """Judge a model on a task.

    Args:
        model: An artifact or its directory, held to the original it holds; or a model in any form, held to its eager
            self.
        task: A task, or its name with options: ``digits{fold=2}``, ``package.module:Class``.  A trained model is
            judged on the fold it has not seen.
        target: Where a model runs: eager where left out; a target that is lowered to gets the model by way of
            ``recipe``, in the default forms of the operators.  An artifact runs where it was made for.
        recipe: See ``target``; None: no passes.
        threads: Of an artifact; None leaves the choice to its runtime.
        trust_remote_code: Allow Python files of a Hugging Face directory to define the model.
        progress: Called with (what, done, total).

    Raises:
        UsageError: a name or a combination that makes no sense.
        DataError: the model and the task do not fit.
        XformoptError: the model cannot be captured, lowered or run.

    """
    if target is not None:
        check_target(target)
    progress("loading", 0, 1)
    artifact = open_artifact(model, threads=threads)
    if artifact is not None:
        return _evaluate_artifact(artifact, task, target, progress)
    original = capture_original(model, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    chosen = task_for(task, original.label)
    eager = program_subject(original.program, original.label)
    check_fit(chosen, eager)
    if target in (None, "eager"):
        return judge(chosen, eager, eager, progress)
    with tempfile.TemporaryDirectory(prefix="xformopt-evaluate-") as scratch:
        subject = _on_target(original, str(target), recipe, chosen, threads, Path(scratch), progress)
        return judge(chosen, subject, eager, progress)


def judge(task: Task, subject: Subject, original: Subject | None, progress: Progress = _silent) -> Evaluation:
    """Run a subject over a task, and its original where there is one, which may be the subject itself.

    Raises:
        DataError: they do not fit the task.

    """
    check_fit(task, subject)
    run = _fitted(task, subject)
    if original is None:
        return Evaluation(task, subject.target, task.evaluate(run, progress), None)
    if original is subject:
        score = task.compare(run, run, progress)
        return Evaluation(task, subject.target, score, score)
    check_fit(task, original)
    reference = _fitted(task, original)
    baseline = task.compare(reference, reference, _prefixed("original", progress))
    return Evaluation(task, subject.target, task.compare(run, reference, progress), baseline)


def check_fit(task: Task, subject: Subject) -> None:
    """Refuse a subject that takes other inputs than the task supplies, or lacks the output it judges.

    Raises:
        DataError: the message has the first input or output that does not fit.

    """
    takes, supplies = ", ".join(subject.inputs), ", ".join(task.inputs)
    if unmet := [name for name in subject.inputs if name not in task.inputs]:
        raise DataError(
            f"{subject.name} does not fit the task {task.name}: it takes the input {unmet[0]!r}, and the task supplies "
            f"only {supplies}. Evaluate a model with those inputs."
        )
    if unused := [name for name in task.inputs if name not in subject.inputs]:
        raise DataError(
            f"{subject.name} does not fit the task {task.name}: the task supplies the input {unused[0]!r}, and the "
            f"model takes only {takes}. Evaluate a model with the inputs {supplies}."
        )
    if task.output not in subject.outputs:
        raise DataError(
            f"{subject.name} does not fit the task {task.name}, which judges the output {task.output!r}: the model "
            f"has only {', '.join(subject.outputs)}."
        )


def calibration_of(task: Task, program: Program) -> list[dict[str, torch.Tensor]]:
    """Return the task's calibration batches, cut to the batch of a program that fixes it.

    Raises:
        DataError: they do not fit the program's inputs.

    """
    subject = program_subject(program, program.name)
    check_fit(task, subject)
    batches = task.calibration()
    if subject.rows is not None:
        batches = [piece for batch in batches for piece, _ in _pieces(batch, subject.rows)]
    for batch in batches:
        try:
            program.bind(batch)
        except DataError as error:
            raise DataError(f"The calibration data of the task {task.name} does not fit: {error}") from error
    return batches


def score_of(task: Task, original: Program) -> Callable[[Program], float] | None:
    """Return what programs reach on the task's validation items, higher is better; None where it has none.

    A metric that is better the lower counts by its negative.  Programs take what ``original`` takes, with which a task
    may compare them.
    """
    batches = list(task.validation())
    if not batches:
        return None
    run = _fitted(task, program_subject(original, original.name))

    @cache
    def answers() -> dict[int, Tensors]:
        return {id(batch.inputs): run(batch.inputs) for batch in batches}

    def score(program: Program) -> float:
        tried = _fitted(task, program_subject(program, program.name))
        value = task.compare(tried, lambda inputs: answers()[id(inputs)], batches=batches).value
        return value if task.higher_is_better else -value

    return score


def program_subject(program: Program, name: str) -> Subject:
    """Return a Program that torch runs node by node."""
    inputs = {spec.name: spec.shape for spec in program.inputs}
    return Subject(name, "eager", inputs, program.output_names, program.run)


def artifact_subject(artifact: Artifact) -> Subject:
    """Return an artifact in the session it was made for."""
    fixed = {dim.name: dim.low for dim in artifact.manifest.dims if dim.low == dim.high}
    inputs = {spec.name: tuple(fixed.get(str(size), size) for size in spec.shape) for spec in artifact.manifest.inputs}

    def run(given: Tensors) -> dict[str, torch.Tensor]:
        outputs = artifact.run(**{name: value.numpy() for name, value in given.items()})
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    return Subject(artifact.manifest.name, artifact.target, inputs, artifact.output_names, run)


def _evaluate_artifact(artifact: Artifact, task: str | Task, target: str | None, progress: Progress) -> Evaluation:
    if target not in (None, artifact.target):
        raise UsageError(
            f"The artifact {artifact.folder} was made for {artifact.target} and does not run on {target}. Leave "
            f"--target out, or evaluate the model it was made from."
        )
    chosen = task_for(task, artifact.manifest.source or artifact.manifest.name)
    known = artifact.captured is not None or (artifact.folder / "program").is_dir()
    original = program_subject(artifact.original(), artifact.manifest.name) if known else None
    return judge(chosen, artifact_subject(artifact), original, progress)


def _on_target(
    original: Original,
    target: str,
    recipe: str | Path | None,
    task: Task,
    threads: int | None,
    scratch: Path,
    progress: Progress,
) -> Subject:
    """Return the model on a target other than eager: compiled as it is, or optimized and lowered."""
    from xformopt.lowering import lower, open_runner
    from xformopt.pipeline import Pipeline
    from xformopt.program import save_program

    program = original.program
    if target in BASELINES:
        save_program(program, scratch / "original")
        runner = open_runner(target, scratch / "original", threads=threads or torch.get_num_threads())

        def run(given: Tensors) -> dict[str, torch.Tensor]:
            found = runner.run({name: value.numpy() for name, value in given.items()})
            return {name: torch.from_numpy(value) for name, value in found.items()}

        return replace(program_subject(program, original.label), target=target, run=run)
    steps = Pipeline(passes_of(recipe))
    calibration = calibration_of(task, program) if any(step.effect != "exact" for step in steps.passes) else ()
    score = score_of(task, program) if calibration else None
    result = steps.run(program, calibration, target, score=score, progress=progress)
    return artifact_subject(lower(result.program, target, measure=False, threads=threads, progress=progress))


def _fitted(task: Task, subject: Subject) -> Run:
    """Return a run that takes the task's batches: cut to the subject's own batch, errors told in the task's name."""

    def run(inputs: Tensors) -> Tensors:
        try:
            if subject.rows is None:
                return subject.run(inputs)
            found = [(subject.run(piece), kept) for piece, kept in _pieces(inputs, subject.rows)]
        except DataError as error:
            raise DataError(f"{subject.name} does not fit the task {task.name}: {error}") from error
        return {name: torch.cat([outputs[name][:kept] for outputs, kept in found]) for name in subject.outputs}

    return run


def _pieces(inputs: Tensors, rows: int) -> list[tuple[dict[str, torch.Tensor], int]]:
    """Cut a batch into batches of ``rows``, the last one filled up with its last item; and how many items count."""
    count = len(next(iter(inputs.values())))
    pieces = []
    for start in range(0, count, rows):
        kept = min(rows, count - start)
        order = (torch.arange(rows) + start).clamp(max=count - 1)
        pieces.append(({name: value[order] for name, value in inputs.items()}, kept))
    return pieces


def _prefixed(word: str, progress: Progress) -> Callable[[str, int, int], None]:
    return lambda what, done, total: progress(f"{what} ({word})", done, total)
