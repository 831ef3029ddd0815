"""What doing less costs and saves: structured pruning and token reduction, on trained tasks and at real sizes.

    python tools/measure_reduction.py [--technique NAME ...] [MODEL ...]       writes tools/results/reduction.json

For every technique: the FLOPs that are left, the time on ort-cpu beside that of the exact artifact (one run, rounds
interleaved, two threads, at the model's example inputs), and on trained models the task's metric before and after,
without training; and once more after one minute of ``recover-accuracy``, which changes no shape and so no time.
Techniques work on the lifted program; the exact recipe follows them, as it makes the artifact that they are compared
with.  ``deit-s`` and ``bert-base`` have random weights: their time alone is of interest.  A technique that refuses a
model says why; what is no faster than the exact artifact is listed with what its operators take more or less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE
from results_file import FOLDER, ResultsFile, beside, timed

import xformopt as xo
from xformopt import evaluation
from xformopt.analysis import cost
from xformopt.benchmark import Candidate
from xformopt.capture.resolve import MINILM
from xformopt.errors import PassError, XformoptError
from xformopt.lowering.artifact import Artifact
from xformopt.models.tasks.task import Score, Task
from xformopt.models.zoo import find_trained
from xformopt.original import capture_original
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.pipeline.recipes import load_recipe
from xformopt.program import Program, example_sizes, sample_inputs
from xformopt.tasks import task_for

RESULTS = ResultsFile(FOLDER / "reduction.json", "xformopt/reduction/1")
TASK_MODELS = ("digits-vit", "digits-deit", "digits-pvt", "listops-t5", "pycode-gpt", "pycode-llama", MINILM)
# real sizes, and the batch that they are timed at
SIZE_MODELS = {"deit-s": ("deit-s", 1), "deit-s batch 8": ("deit-s", 8), "bert-base": ("bert-base", 1)}
TECHNIQUES = {
    "optin 40%": "prune-units{remove=0.4}",
    "magnitude 40%": "prune-units{remove=0.4,importance=magnitude}",
    "wanda 40%": "prune-units{remove=0.4,importance=wanda}",
    "taylor 40%": "prune-units{remove=0.4,importance=taylor}",
    "optin 50%": "prune-units{remove=0.5}",
    "magnitude 50%": "prune-units{remove=0.5,importance=magnitude}",
    "sublayers 25%": "prune-sublayers{remove=0.25}",
    "merge tokens 40%": "merge-tokens{fewer_flops=0.4}",
    "prune tokens 40%": "prune-tokens{fewer_flops=0.4}",
    "transform tokens 40%": "transform-tokens{fewer_flops=0.4}",
    "slim patches 40%": "slim-patches{fewer_flops=0.4}",
    "axformer": "prune-by-score{tolerance=0.005}",
    "hard attention": "harden-attention{keys=16}",
    "svd 40%": "factorize-weights{remove=0.4}",
    "dsformer, half the bytes": "factorize-sparse",
    "remove a layer": "remove-layers",
    "fuse a layer": "fuse-layers{minutes=1.0}",
    "layers side by side": "parallelize-layers",
    "recursive, two layers": "share-layers{layers=2,minutes=1.0}",
}
# models trained to be made smaller, and what each was trained for
TRAINED_FOR = {
    "digits-matformer": {f"prefixes, {share:.0%}": f"extract-prefixes{{remove={share}}}" for share in (0.2, 0.4, 0.5)},
    "digits-flexivit": {f"patches of {side}": f"resize-patches{{patch={side}}}" for side in (8, 16)},
    **{f"digits-joined{depth}": {"merged branches": "merge-branches"} for depth in (6, 4, 3)},
}
# removal at real sizes: what is removed does not change the time, so the cheapest importance stands for all
AT_SIZE = (
    "magnitude 40%",
    "magnitude 50%",
    "sublayers 25%",
    "merge tokens 40%",
    "transform tokens 40%",
    "svd 40%",
    "layers side by side",
)
SAMPLES = 8
OPERATORS = 4
# recovery sees more calibration data than the techniques do
RECOVERY, RECOVERY_SAMPLES = "recover-accuracy{minutes=1}", 1024
FEWER_SECONDS = {"optin 40%": ",together=8", "optin 50%": ",together=8"}


@dataclass
class Subject:
    """A model, what it is judged by, and its exact artifact."""

    label: str
    program: Program
    inputs: dict[str, torch.Tensor]
    calibration: list[dict[str, torch.Tensor]]
    task: Task | None
    exact: Program
    more: Sequence[dict[str, torch.Tensor]] = ()
    # where the task scores by agreement with it
    original: evaluation.Subject | None = None
    score: Score | None = None


def subject_of(name: str) -> Subject:
    """Capture a model; of a trained one the first fold."""
    if name in SIZE_MODELS:
        known, batch = SIZE_MODELS[name]
        model, inputs = REFERENCE[known][0]()
        # of one length: where it may be 1, no token can leave
        program = xo.capture(model, inputs, {key: {0: "batch"} for key in inputs})
        samples = [sample_inputs(program, example_sizes(program), seed=seed) for seed in range(1, SAMPLES + 1)]
        inputs = {key: value.repeat(batch, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
        return Subject(name, program, inputs, samples, None, run_passes(program, (), samples))
    label = name if name == MINILM else find_trained(name).on_fold(0).label
    program = capture_original(label).program
    task = task_for("retrieval" if name == MINILM else find_trained(name).task, label)
    samples = evaluation.calibration_of(task, program)
    more = evaluation.calibration_of(replace(task, samples=RECOVERY_SAMPLES), program)
    exact = run_passes(program, (), samples)
    original = evaluation.program_subject(program, label) if name == MINILM else None
    return Subject(name, program, dict(program.example_inputs), samples, task, exact, more, original)


def run_passes(
    program: Program,
    passes: Sequence[str],
    samples: Sequence[dict[str, torch.Tensor]],
    task: Task | None = None,
    observe: Any = None,
) -> Program:
    """Run a technique and the exact recipe; a technique may choose by the score of validation items of the task.

    Raises:
        PassError: the technique left the program as it is.

    """
    steps = (*(parse_pass(text) for text in passes), *load_recipe("exact"))
    score = None if task is None else evaluation.score_of(task, program)
    result = Pipeline(steps).run(program, calibration=samples, score=score, observe=observe)
    named = {step.name for step in steps[: len(passes)]}
    for record in result.history:
        if record.name in named and not record.changed:
            why = "; ".join(reason for reason, _ in record.rejected) or record.dropped
            raise PassError(f"The pass {record.name} left the program as it is: {why}.")
    return result.program


def recovered(subject: Subject, reduced: Program, folder: Path) -> dict[str, Any]:
    """Return what a reduced program reaches on the task once it is trained towards the original, or why it cannot."""
    lifted = Pipeline().run(subject.program).program
    steps = (parse_pass(RECOVERY), *load_recipe("exact"))
    try:
        done = Pipeline(steps).run(reduced, calibration=subject.more, original=lifted)
    except XformoptError as error:
        return {"pass": RECOVERY, "refused": str(error)}
    record = done.history[0]
    row = beside(subject.score, scored(subject, build(done.program, folder)))
    return {"pass": RECOVERY, "changed": record.changed, "seconds": record.seconds, "notes": record.notes, **row}


def build(program: Program, folder: Path) -> Artifact:
    """Lower a program, with the default forms: those of both sides are then the same."""
    artifact = xo.lower(program, measure=False)
    artifact.save(folder, program=False)
    return artifact


def scored(subject: Subject, artifact: Artifact) -> Score | None:
    """Judge an artifact on the task, if there is one."""
    if subject.task is None:
        return None
    return evaluation.judge(subject.task, evaluation.artifact_subject(artifact), subject.original).score


def measure(name: str, wanted: Mapping[str, str]) -> dict[str, Any]:
    """Measure techniques, each with its pass, on one model."""
    subject = subject_of(name)
    flops = cost(subject.exact, example_sizes(subject.exact)).flops
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subject.score = scored(subject, build(subject.exact, folder / "exact"))
        candidates = [Candidate("exact", "ort-cpu", folder / "exact", flops=flops)]
        for number, (technique, text) in enumerate(wanted.items()):
            kept = folder / str(number)
            rows[technique] = row = {"pass": text, **reduce(subject, text, kept, flops)}
            if "flops_left" in row:
                left = row["flops_left"] * flops
                candidates.append(Candidate(technique, "ort-cpu", kept, flops=left, max_relative_l2=float("inf")))
            print(name, technique, row, flush=True)
        for technique, found in timings(subject, candidates).items():
            rows.setdefault(technique, {}).update(found)
            print(name, technique, found, flush=True)
    result: dict[str, Any] = {"techniques": rows, "flops": flops}
    if subject.task is not None and subject.score is not None:
        result |= {"task": subject.task.name, "metric": subject.task.metric, "exact": subject.score.value}
        result |= {"higher_is_better": subject.task.higher_is_better, "count": subject.score.count}
    return result


def reduce(subject: Subject, text: str, folder: Path, flops: float) -> dict[str, Any]:
    """Run a technique, keep its artifact, and return the FLOPs that are left and what it reaches; or why it refuses."""
    seen: list[Program] = []
    try:
        name = parse_pass(text).name
        program = run_passes(
            subject.program,
            (text,),
            subject.calibration,
            subject.task,
            lambda record, left: seen.append(left) if record.name == name else None,
        )
        row = beside(subject.score, scored(subject, build(program, folder)))
    except XformoptError as error:
        return {"refused": str(error)}
    row = {"flops_left": cost(program, example_sizes(program)).flops / flops, **row}
    if subject.task is not None:
        row["recovered"] = recovered(subject, seen[0], folder.with_suffix(".recovered"))
    return row


def techniques_of(name: str) -> dict[str, str]:
    """Return the passes to measure on a model."""
    if name in TRAINED_FOR:
        return TRAINED_FOR[name]
    if name in SIZE_MODELS:
        return {technique: TECHNIQUES[technique] for technique in AT_SIZE}
    return {
        technique: text.replace("}", FEWER_SECONDS.get(technique, "") + "}") for technique, text in TECHNIQUES.items()
    }


def timings(subject: Subject, candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """Time all artifacts in one run; what is no faster than the exact one shows how its operators' times differ."""
    runs = timed(candidates, subject.exact, subject.inputs, subject.label, profile_rounds=2)
    before = {operator.name: operator.ms for operator in runs["exact"].operators or ()}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        row: dict[str, Any] = {"p50_ms": run.latency_ms.p50 if run.latency_ms else None, "error": run.error}
        if run.speedup is not None:
            row["speedup"] = run.speedup.model_dump()
            if not run.speedup.is_difference or run.speedup.ratio < 1:
                now = {operator.name: operator.ms for operator in run.operators or ()}
                change = {key: now.get(key, 0.0) - before.get(key, 0.0) for key in {**before, **now}}
                largest = sorted(change.items(), key=lambda item: -abs(item[1]))[:OPERATORS]
                row["operator_change_ms"] = dict(largest)
        rows[name] = row
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure the models named on the command line anew, or what is missing of all."""
    every = (*TASK_MODELS, *TRAINED_FOR, *SIZE_MODELS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(every)}")
    parser.add_argument("--technique", action="append", help="one of the techniques; all where none is named")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.models if name not in every]:
        parser.error(f"there is no model {unknown[0]!r} here: name {', '.join(every)}")
    techniques = dict.fromkeys(technique for name in every for technique in techniques_of(name))
    if unknown := [technique for technique in given.technique or () if technique not in techniques]:
        parser.error(f"there is no technique {unknown[0]!r}: name {', '.join(techniques)}")
    for name in given.models or every:
        known = RESULTS.entries().get(name, {}).get("techniques", {})
        wanted = {key: text for key, text in techniques_of(name).items() if key in (given.technique or (key,))}
        if not given.models:
            wanted = {key: text for key, text in wanted.items() if key not in known}
        if wanted:
            found = measure(name, wanted)
            # times compare with the exact artifact of their own run: a model that is measured anew forgets the others
            kept = known if given.technique or not given.models else {}
            RESULTS.put(name, {**found, "techniques": {**kept, **found["techniques"]}})


if __name__ == "__main__":
    main(sys.argv[1:])
