"""What recovery by distillation gives back on a task: a lossy technique, and the same one trained afterwards.

    python tools/measure_recovery.py [MODEL ...]        writes tools/results/recovery.json

Programs are run by torch.  Techniques see the task's own calibration data, recovery 1,024 items of it, and takes ten
minutes at most on the one thread it is given.  Models of several folds are judged on the first one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from results_file import FOLDER, ResultsFile

from xformopt.evaluation import calibration_of, judge, program_subject
from xformopt.models.tasks.task import Score, Task
from xformopt.models.zoo import find_trained
from xformopt.original import capture_original
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.program import Program
from xformopt.tasks import task_for

RESULTS = ResultsFile(FOLDER / "recovery.json", "xformopt/recovery/1")
MODELS = ("digits-vit", "listops-t5")
SAMPLES = 1024
# the technique, how it is recovered from, and what follows
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "units 50%": ("prune-units{remove=0.5,together=8}", "recover-accuracy{minutes=5}", ()),
    "units 50%, lora": ("prune-units{remove=0.5,together=8}", "recover-accuracy{minutes=5,train=lora}", ()),
    "ternary": (
        "quantize-ternary{trainable=true}",
        "recover-accuracy{minutes=10,learning_rate=2e-3}",
        ("pack-ternary",),
    ),
}


def score_of(task: Task, program: Program) -> Score:
    """Judge a program, run by torch."""
    return judge(task, program_subject(program, program.name), None).score


def measure(name: str) -> dict[str, Any]:
    """Measure all cases on one model."""
    trained = find_trained(name).on_fold(0)
    captured = capture_original(trained.label).program
    task = task_for(trained.task, trained.label)
    few, many = (calibration_of(which, captured) for which in (task, replace(task, samples=SAMPLES)))
    original = Pipeline().run(captured).program
    rows: dict[str, Any] = {}
    for case, (technique, recovery, rest) in CASES.items():
        lossy = Pipeline([parse_pass(technique)]).run(original, few).program
        steps = [parse_pass(text) for text in (recovery, *rest)]
        done = Pipeline(steps).run(lossy, many, original=original)
        record = done.history[0]
        rows[case] = {
            "passes": [technique, recovery, *rest],
            "before": score_of(task, lossy).value,
            "after": score_of(task, done.program).value,
            "seconds": record.seconds,
            "notes": record.notes,
        }
        print(name, case, rows[case], flush=True)
    exact = score_of(task, original)
    return {"task": task.name, "metric": task.metric, "exact": exact.value, "count": exact.count, "cases": rows}


def main(names: Sequence[str]) -> None:
    """Measure the models named on the command line, or all."""
    if unknown := [name for name in names if name not in MODELS]:
        sys.exit(f"There is no model {unknown[0]!r} here: name {', '.join(MODELS)}.")
    torch.set_num_threads(1)
    for name in names or MODELS:
        RESULTS.put(name, measure(name))


if __name__ == "__main__":
    main(sys.argv[1:])
