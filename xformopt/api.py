"""The jobs xformopt does, each a function: optimize, export, bench, evaluate.  The command line only adds words."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xformopt.benchmark import BenchSettings, Progress
from xformopt.comparison import (
    add_baselines,
    artifact_candidate,
    as_tensors,
    check_target,
    compare,
    measured_speedup,
    measured_times,
    unique_names,
)
from xformopt.errors import MeasurementError, UsageError
from xformopt.evaluation import (
    Evaluation,
    artifact_subject,
    calibration_of,
    check_fit,
    evaluate,
    judge,
    program_subject,
    score_of,
)
from xformopt.files import check_output
from xformopt.inspection import Inspection, Plan, inspect, passes_of, plan
from xformopt.lineup import sort_candidates
from xformopt.lowering.catalog import TUNING_SECONDS
from xformopt.original import Model, Original, capture_original, chosen_inputs, chosen_sizes
from xformopt.pipeline import Pass, Pipeline, PipelineResult, Record
from xformopt.pipeline.run import describe
from xformopt.program import Program
from xformopt.tasks import task_for

if TYPE_CHECKING:
    from xformopt.lowering.artifact import Artifact
    from xformopt.models.tasks.task import Task
    from xformopt.report.schema import BenchReport

__all__ = [
    "Evaluation",
    "Inspection",
    "Optimized",
    "Plan",
    "bench",
    "evaluate",
    "export",
    "inspect",
    "optimize",
    "plan",
]


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Optimized:
    """What :func:`optimize` made.

    Attributes:
        artifact: As saved, or in a folder of its own that lives as long as this object.
        result: The optimized Program and the record of every pass.
        report: The comparison with the original; None where it was not asked for.
        original: What was optimized.
        evaluation: What the artifact and the original reach on the task, where one was given.

    """

    artifact: Artifact
    result: PipelineResult
    report: BenchReport | None
    original: Original
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of ``optimize --json``."""
        return {
            "schema": "xformopt/optimize/1",
            "model": self.original.label,
            "target": self.artifact.target,
            "notes": list(self.original.notes),
            "passes": [describe(record) for record in self.result.history],
            "bench": self.report.to_dict() if self.report else None,
            "task": self.evaluation.to_dict() if self.evaluation else None,
        }


def optimize(
    model: Model,
    output: str | Path | None = None,
    *,
    target: str = "ort-cpu",
    recipe: str | Path | None = "exact",
    passes: Iterable[str | Pass] = (),
    calibration: str | Path | Iterable[Mapping[str, torch.Tensor]] = (),
    task: str | Task | None = None,
    batch: int | None = None,
    length: int | None = None,
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    max_drift: float | None = None,
    strict: bool = False,
    keep_if_faster: bool = False,
    measure_lowering: bool = True,
    bench: bool = True,
    assume: Iterable[str] = (),
    seed: int = 0,
    threads: int | None = None,
    tuning_seconds: float = TUNING_SECONDS,
    rounds: int | None = None,
    overwrite: bool = False,
    keep_program: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = _silent,
    observe: Callable[[Record, Program], None] | None = None,
) -> Optimized:
    """Capture a model, run passes, lower the result, and measure what that bought.

    Args:
        model: A MODEL string or path, a torch module with ``example_inputs()``, or a Program.
        output: The artifact directory to write; None writes nothing.
        target: What to lower to.
        recipe: A recipe by name or file; None: none.
        passes: Further passes, as objects or as text (``"fuse-qkv{option=value}"``).
        calibration: A file (see ``xformopt.calibration``), or batches of tensors by input name.
        task: A task or its name: judges the result and the original, supplies the calibration data where none is
            given, and, on validation items, the score that passes may choose by.
        batch: Size of the batch to choose forms for and to measure at; that of the example where left out.
        length: The same of the length.
        lengths: For ``tvm-*``: lengths to compile a function for, each.
        batches: The same of the batch.
        max_drift: Largest relative L2 to the original that a lossy pass may reach.
        strict: A pass over that budget stops the run instead of being taken back.
        keep_if_faster: A lossy pass without a measured speed-up is taken back.
        measure_lowering: Whether to time the forms an operator may take, and keep the fastest.
        bench: Whether to compare the artifact with the original.
        assume: Facts the caller vouches for, such as ``no-padding``.
        seed: Seed of everything random.
        threads: For lowering and measuring; None takes what torch and the machine offer.
        tuning_seconds: How long to look for the fastest forms or tiles.
        rounds: Of the comparison; None chooses.
        overwrite: Whether an artifact at ``output`` may be replaced.
        keep_program: Whether the artifact holds the original Program, so that it can be measured against it.
        trust_remote_code: Allow Python files of a Hugging Face directory to define the model.
        progress: Called with (what, done, total).
        observe: Called after every pass with its record and the program it left.

    Raises:
        XformoptError: whatever stops the work; nothing is written then.

    """
    from xformopt.lowering import lower

    if output is not None:
        check_output(output, overwrite)
    check_target(target, baseline=False)
    steps = passes_of(recipe, passes)
    progress("capture", 0, 1)
    original = capture_original(model, trust_remote_code=trust_remote_code, length=length)
    chosen = task_for(task, original.label) if task is not None else None
    samples = _batches(calibration, original)
    eager = program_subject(original.program, original.label)
    if chosen is not None:
        check_fit(chosen, eager)
        samples = [*samples] or calibration_of(chosen, original.program)
    length = max(lengths) if lengths and length is None else length
    batch = max(batches) if batches and batch is None else batch
    sizes = chosen_sizes(original.program, batch, length)
    inputs = chosen_inputs(original.program, batch, length, seed=seed)
    settings = BenchSettings(threads=threads, rounds=rounds, seed=seed)
    measures = (bench or keep_if_faster) and any(step.effect != "exact" for step in steps)
    result = Pipeline(steps, max_drift, strict, keep_if_faster).run(
        original.program,
        samples,
        target,
        seed=seed,
        assume=assume,
        measure=(lambda before, after: measured_speedup(before, after, target, inputs, settings)) if measures else None,
        time=lambda programs: measured_times(programs, target, threads=threads),
        score=score_of(chosen, original.program) if chosen is not None else None,
        observe=observe,
        progress=progress,
    )
    artifact = lower(
        result.program,
        target,
        measure=measure_lowering,
        sizes=sizes,
        lengths=lengths,
        batches=batches,
        threads=threads,
        tuning_seconds=tuning_seconds,
        captured=original.program,
        history=[describe(record) for record in result.history],
        source=original.label,
        files=original.files,
        progress=progress,
    )
    evaluation = judge(chosen, artifact_subject(artifact), eager, progress) if chosen is not None else None
    report = None
    if bench:
        report = _against_the_original(artifact, original, inputs, settings, result.history, progress)
    if output is not None:
        progress("saving", 0, 1)
        artifact = artifact.save(output, overwrite=overwrite, program=keep_program, documents=_documents(report))
    return Optimized(artifact, result, report, original, evaluation)


def export(
    model: Model,
    output: str | Path,
    *,
    target: str = "ort-cpu",
    batch: int | None = None,
    length: int | None = None,
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    measure_lowering: bool = True,
    threads: int | None = None,
    tuning_seconds: float = TUNING_SECONDS,
    overwrite: bool = False,
    keep_program: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = _silent,
) -> Artifact:
    """Lower a model without passes but what lowering needs.

    Args:
        model: A MODEL string or path, a torch module with ``example_inputs()``, or a Program.
        output: An artifact directory; or a file ``name.onnx``, with large weights beside it in ``name.onnx.data``.
        target: What to lower to.
        batch: Size of the batch to choose forms for; that of the example where left out.
        length: The same of the length.
        lengths: For ``tvm-*``: lengths to compile a function for, each.
        batches: The same of the batch.
        measure_lowering: Whether to time the forms an operator may take, and keep the fastest.
        threads: To choose forms for.
        tuning_seconds: How long to look for the fastest.
        overwrite: Whether what exists at ``output`` may be replaced.
        keep_program: Whether the artifact holds the original Program.
        trust_remote_code: Allow Python files of a Hugging Face directory to define the model.
        progress: Called with (what, done, total).

    Raises:
        XformoptError: whatever stops the work; nothing is written then.

    """
    is_file = Path(output).suffix == ".onnx"
    if is_file and target.startswith(("tvm-", "triton-")):
        raise UsageError(f"The target {target} writes no ONNX. Name a folder instead of {output}.")
    check_output(output, overwrite, marker=None if is_file else "artifact.json")
    made = optimize(
        model,
        None if is_file else output,
        target=target,
        recipe=None,
        batch=batch,
        length=length,
        lengths=lengths,
        batches=batches,
        measure_lowering=measure_lowering,
        bench=False,
        threads=threads,
        tuning_seconds=tuning_seconds,
        overwrite=overwrite,
        keep_program=keep_program,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if is_file:
        from xformopt.lowering.onnx_files import copy_onnx

        copy_onnx(made.artifact.model_path, Path(output), overwrite)
    return made.artifact


def bench(
    candidates: Sequence[Artifact | Model],
    inputs: Mapping[str, Any] | None = None,
    *,
    targets: Iterable[str] | None = (),
    recipe: str | Path | None = "exact",
    batch: int | None = None,
    length: int | None = None,
    threads: int | None = None,
    rounds: int | None = None,
    over: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = _silent,
) -> BenchReport:
    """Measure systems against each other on the same inputs, each in a process of its own.

    Args:
        candidates: Artifacts, artifact directories, ``.onnx`` files and names of targets; and at most one model, the
            original.  Without one, the original is that of the first artifact.
        inputs: Arrays or tensors by input name; None draws them at ``batch`` and ``length``.
        targets: Further names of targets.  Baselines run the original; any other gets it by way of ``recipe``.  None
            chooses: eager wherever the original is known, and ort-cpu where nothing else is named.
        recipe: See ``targets``.
        batch: Where inputs are drawn; that of the example where left out.
        length: The same of the length.
        threads: Of every run; None takes the cores this process may use.
        rounds: None chooses.
        over: The name of the run that speed-ups are over; ``eager`` if it is there, else the first.
        seed: Of inputs and intervals.
        trust_remote_code: Allow Python files of a Hugging Face directory to define the model.
        progress: Called with (what, done, total).

    Returns:
        A run for each candidate; one that failed has ``error`` and no times.

    Raises:
        UsageError: a name, a combination or a setting that makes no sense.
        XformoptError: a model, an artifact or an input cannot be used.

    """
    lineup = sort_candidates(candidates, targets, trust_remote_code=trust_remote_code, length=length)
    job = {"recipe": recipe, "batch": batch, "length": length, "threads": threads, "seed": seed, "progress": progress}
    for target in lineup.lowered:
        original = lineup.original_for(target)
        artifact = optimize(original, target=target, bench=False, **job).artifact  # type: ignore[arg-type]
        lineup.kept.append(artifact)
        lineup.candidates.append(artifact_candidate(artifact, target))
    chosen = as_tensors(inputs) if inputs is not None else lineup.inputs(batch, length, seed)
    settings = BenchSettings(threads=threads, rounds=rounds, over=over, seed=seed)
    known = lineup.original
    with tempfile.TemporaryDirectory(prefix="xformopt-bench-") as scratch:
        runs = list(lineup.candidates)
        if lineup.baselines:
            program = lineup.original_for(lineup.baselines[0]).program
            runs = [*add_baselines(lineup.baselines, program, Path(scratch)), *runs]
        return compare(
            unique_names(runs),
            chosen,
            known.program if known else None,
            settings=settings,
            source=known.label if known else None,
            progress=progress,
        )


def _batches(
    calibration: str | Path | Iterable[Mapping[str, torch.Tensor]], original: Original
) -> Iterable[Mapping[str, torch.Tensor]]:
    from xformopt.calibration import load_calibration

    if isinstance(calibration, str | Path):
        return load_calibration(calibration, original.program, tokenizer_files=original.files)
    return calibration


def _against_the_original(
    artifact: Artifact,
    original: Original,
    inputs: Mapping[str, torch.Tensor],
    settings: BenchSettings,
    history: Sequence[Record],
    progress: Progress,
) -> BenchReport:
    """Compare an artifact with the original in eager mode; the report tells how it was made."""
    from xformopt.report.schema import PassRecord

    with tempfile.TemporaryDirectory(prefix="xformopt-bench-") as scratch:
        runs = [
            *add_baselines(["eager"], original.program, Path(scratch)),
            artifact_candidate(artifact, artifact.target),
        ]
        report = compare(runs, inputs, original.program, settings=settings, source=original.label, progress=progress)
    for run in report.runs:
        if run.error is not None:
            raise MeasurementError(
                f"The comparison with the original failed, and nothing was written: {run.name}: {run.error} "
                f"Use --no-bench to write the artifact without it."
            )
    report.passes = [PassRecord(**describe(record)) for record in history]
    return report


def _documents(report: BenchReport | None) -> dict[str, str]:
    """Return the files that tell of a comparison, by name."""
    from xformopt.report.html import render

    if report is None:
        return {}
    return {"bench.json": json.dumps(report.to_dict(), indent=1) + "\n", "report.html": render([report])}
