"""What few bits cost on tasks: five methods at several widths, and int8 and weights of 4 bits beside them.

    python tools/measure_low_bit.py [TASK ...]      writes tools/results/low-bit.json

Tasks are ``digits`` (all five folds together), ``listops``, ``retrieval`` and ``pycode``.  Every program is run by
torch; the linear layers of int8 execute in integers on every target, fewer bits execute nowhere: weights are stored in
them and computed in float, activations are simulated.  Intervals are of the difference to fp32, and of that to rounding
at the same width, over the same items drawn in pairs.  A method that refuses a model says why.  A width that is in the
file already is passed over, unless its task is named.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from results_file import FOLDER, ResultsFile

from xformopt.capture.resolve import MINILM
from xformopt.errors import XformoptError
from xformopt.evaluation import Subject, calibration_of, judge, program_subject
from xformopt.measure.statistics import paired_difference
from xformopt.models.tasks.task import Score, Task
from xformopt.models.zoo import find_trained
from xformopt.original import capture_original
from xformopt.passes import parse_pass
from xformopt.pipeline import Context, Pipeline
from xformopt.program import Program
from xformopt.tasks import task_for

JUDGED = "programs run by torch; below 8 bits weights are stored packed, activations are simulated"
RESULTS = ResultsFile(FOLDER / "low-bit.json", "xformopt/low-bit/1", "tasks", {"judged": JUDGED})
MODELS = {"digits": "digits-vit", "listops": "listops-t5", "retrieval": MINILM, "pycode": "pycode-llama"}
# bits of weights and activations; the last two are no common target, and show where the methods part
WIDTHS = ((6, 6), (4, 8), (4, 4), (3, 3), (2, 3))
ROUNDING = "rounding"
# the passes of a method, by the bits of weights and activations
METHODS: dict[str, Callable[[int, int], tuple[str, ...]]] = {
    ROUNDING: lambda w, a: (f"quantize-low-bit{{weight_bits={w},activation_bits={a}}}",),
    "smoothquant": lambda w, a: (SMOOTH, f"quantize-low-bit{{weight_bits={w},activation_bits={a}}}"),
    "repquant": lambda w, a: (f"repquant{{weight_bits={w},activation_bits={a}}}",),
    "adalog": lambda w, a: (f"adalog{{weight_bits={w},activation_bits={a}}}",),
    # the paper trains 20,000 steps on 1,024 images; this takes a minute for a model
    "aphq": lambda w, a: (f"aphq{{bits={w},activation_bits={a},minutes=0.5}}",),
}
SMOOTH = "smooth-outliers{search=true,multiply=true}"
# executed in integers, with ranges of activations as they come and calibrated; and stored in 4 bits, computed in float
COMMON = {
    "int8": {"dynamic": ("quantize-dynamic",), "static": (SMOOTH, "quantize-static")},
    "int4 weights": {
        ROUNDING: ("quantize-weights{bits=4}",),
        "gptq": ("quantize-weights{bits=4,method=gptq}",),
        "awq": ("scale-salient-channels", "quantize-weights{bits=4}"),
    },
}


@dataclass
class Case:
    """One fold of a task, with the model that has not seen it."""

    task: Task
    exact: Program
    eager: Score
    original: Subject | None
    calibration: list[dict[str, torch.Tensor]]


@dataclass
class Reached:
    """What one method reached on all folds."""

    scores: list[Score] = field(default_factory=list)
    seconds: float = 0.0
    notes: set[str] = field(default_factory=set)

    @property
    def items(self) -> torch.Tensor:
        """The items of all folds."""
        return torch.cat([score.items for score in self.scores])

    @property
    def weights(self) -> torch.Tensor:
        """What each item counts."""
        return torch.cat([s.weights if s.weights is not None else torch.ones_like(s.items) for s in self.scores])

    @property
    def value(self) -> float:
        """The mean over all items."""
        return float((self.items * self.weights).sum() / self.weights.sum())


def cases(name: str) -> list[Case]:
    """Capture the model of every fold, run the exact recipe and judge the original."""
    model = MODELS[name]
    labels = [model]
    if model != MINILM:
        trained = find_trained(model)
        labels = [trained.on_fold(fold).label for fold in range(trained.folds)]
    found = []
    for label in labels:
        original = capture_original(label)
        task = task_for(name, original.label)
        calibration = calibration_of(task, original.program)
        exact = Pipeline.recipe("exact").run(original.program, calibration=calibration).program
        # a task that scores by agreement with the original has to know it
        subject = program_subject(original.program, label)
        compared = subject if name == "retrieval" else None
        eager = judge(task, subject, compared).score
        found.append(Case(task, exact, eager, compared, calibration))
        print(f"{label}: fp32 {eager.value:.4f}", flush=True)
    return found


def run_passes(name: str, folds: Sequence[Case], passes: Sequence[str]) -> Reached:
    """Quantize every fold's model and judge it."""
    reached = Reached()
    for fold in folds:
        begin = time.perf_counter()
        program = fold.exact
        for text in passes:
            result = parse_pass(text).run(program, Context(calibration=fold.calibration, original=fold.exact))
            program = result.program
            reached.notes |= {rejected.reason for rejected in result.rejected}
        reached.seconds += time.perf_counter() - begin
        reached.scores.append(judge(fold.task, program_subject(program, name), fold.original).score)
    print(f"{name}: {' '.join(passes)}: {reached.value:.4f} in {reached.seconds:.0f} s", flush=True)
    return reached


def describe(passes: Sequence[str], reached: Reached, fp32: Reached, rounding: Reached | None) -> dict[str, Any]:
    """Return the JSON of one method at one width."""
    return {
        "passes": list(passes),
        "value": reached.value,
        "difference": reached.value - fp32.value,
        "difference_ci95": interval(fp32, reached),
        "over_rounding": None if rounding is None else reached.value - rounding.value,
        "over_rounding_ci95": None if rounding is None else interval(rounding, reached),
        "folds": [score.value for score in reached.scores],
        "seconds_to_quantize": round(reached.seconds, 1),
        "left_out": sorted(reached.notes),
    }


def interval(one: Reached, other: Reached) -> list[float] | None:
    """Return the interval of the difference over items drawn in pairs."""
    found = paired_difference(one.items.tolist(), other.items.tolist(), one.weights.tolist())
    return None if found is None else [found.low, found.high]


def measure(name: str, known: Mapping[str, Any]) -> None:
    """Measure what is missing of a task; the file is written after every width."""
    folds = cases(name)
    fp32 = Reached([fold.eager for fold in folds])
    task = folds[0].task
    entry: dict[str, Any] = dict(known) or {
        "model": MODELS[name],
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "count": len(fp32.items),
        "fp32": fp32.value,
        "widths": {},
    }
    for label, variants in COMMON.items():
        if label not in entry["widths"]:
            entry["widths"][label] = {title: tried(name, folds, passes, fp32) for title, passes in variants.items()}
            RESULTS.put(name, entry)
    for weight_bits, activation_bits in WIDTHS:
        label = f"W{weight_bits}A{activation_bits}"
        if label in entry["widths"]:
            continue
        rounding = run_passes(name, folds, METHODS[ROUNDING](weight_bits, activation_bits))
        found = {ROUNDING: describe(METHODS[ROUNDING](weight_bits, activation_bits), rounding, fp32, None)}
        for method, passes_at in METHODS.items():
            if method != ROUNDING:
                found[method] = tried(name, folds, passes_at(weight_bits, activation_bits), fp32, rounding)
        entry["widths"][label] = found
        RESULTS.put(name, entry)


def tried(
    name: str, folds: Sequence[Case], passes: Sequence[str], fp32: Reached, rounding: Reached | None = None
) -> dict[str, Any]:
    """Return the JSON of one method, or why it refuses."""
    try:
        return describe(passes, run_passes(name, folds, passes), fp32, rounding)
    except XformoptError as error:
        print(f"{name}: {' '.join(passes)}: {error}", flush=True)
        return {"passes": list(passes), "refused": str(error)}


def main() -> None:
    """Measure the tasks named on the command line anew, or what is missing of all."""
    if unknown := [name for name in sys.argv[1:] if name not in MODELS]:
        sys.exit(f"There is no task {unknown[0]!r}: name {', '.join(MODELS)}.")
    for name in sys.argv[1:] or MODELS:
        known = {} if name in sys.argv[1:] else RESULTS.entries().get(name, {})
        if len(known.get("widths", {})) < len(WIDTHS) + len(COMMON):
            measure(name, known)


if __name__ == "__main__":
    main()
