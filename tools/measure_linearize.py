"""What linear attention costs and keeps: trained models, linearized, before and after at most ten minutes of recovery.

    python tools/measure_linearize.py [--minutes N] [--samples N] [--method NAME ...] [MODEL ...]
                                                                        writes tools/results/linearize.json

For every model and method: the task's metric of the original, of the linearized model as it is, and of the same after
recovery by distillation, all as artifacts on ort-cpu; and the share of the original's margin over the best trivial
predictor that is kept.  ``liger, window only`` is the control of ``liger``, with the same recovery: what it keeps, the
recurrence has not earned.  Methods run by force; what the gate of lengths says without it is in the file, too, at the
task's own lengths and at 128 tokens.  A method that refuses a model says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import xformopt as xo

sys.path.append(str(Path(__file__).parent))
from results_file import FOLDER, ResultsFile

from xformopt.comparison import measured_times
from xformopt.errors import XformoptError
from xformopt.evaluation import artifact_subject, calibration_of, judge
from xformopt.models.tasks.task import Score, Task
from xformopt.models.zoo import find_trained
from xformopt.original import capture_original
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline, PipelineResult
from xformopt.program import Program
from xformopt.tasks import find_task

RESULTS = FOLDER / "linearize.json"
TARGET = "ort-cpu"
SHORT = 128
# trained towards the original's answers; the paper of Liger takes LoRA, those of the others train everything
LORA, ALL = "lora", "all"
SEQUENCES = {
    "liger": ("linearize-liger{force=true%s}", LORA),
    "liger, window only": ("linearize-liger{force=true,window_only=true%s}", LORA),
    "learned maps": ("linearize-learned-maps{force=true,max_error=1%s}", ALL),
    "learned maps and window": ("linearize-learned-maps{force=true,max_error=9,window=64%s}", ALL),
    "flow": ("linearize-flow{force=true%s}", ALL),
}
IMAGES = {
    "flow": ("linearize-flow{force=true%s}", ALL),
    "eco": ("linearize-eco{force=true%s}", ALL),
    "eco, codes learned anew": ("linearize-eco{force=true%s}", ALL),
    "learned maps": ("linearize-learned-maps{force=true,max_error=1%s}", ALL),
}
MODELS: dict[str, tuple[dict[str, tuple[str, str]], str]] = {
    "recall-llama": (SEQUENCES, ""),
    "pycode-gpt": (SEQUENCES, ""),
    "pycode-llama": (SEQUENCES, ""),
    "listops-t5": (SEQUENCES, ",bias=drop"),
    "digits-vit": (IMAGES, ""),
}
FIT_MINUTES = 2.0
# the gate looks at lengths alone
GATE_MINUTES = 0.1
# how recovery trains a model of 64 channels
RECOVERY = {"recall-llama": ",learning_rate=5e-3"}
# what comes between the first and the second half of recovery
BETWEEN = {"eco, codes learned anew": "rehash-attention"}


@dataclass
class Subject:
    """A trained model, its task, and what it learns from."""

    label: str
    program: Program
    task: Task
    samples: list[dict[str, torch.Tensor]]
    minutes: float
    recovery: str

    def run(self, *passes: str, time: Any = None) -> PipelineResult:
        """Run passes on the model."""
        steps = [parse_pass(text) for text in passes]
        return Pipeline(steps).run(self.program, calibration=self.samples, target=TARGET, time=time)

    def score(self, program: Program) -> Score:
        """Judge a program on the task, as an artifact."""
        return judge(self.task, artifact_subject(xo.lower(program, TARGET, measure=False)), None).score


def subject_of(name: str, samples: int, minutes: float) -> Subject:
    """Capture a model; of several folds the first."""
    label = find_trained(name).on_fold(0).label
    program = capture_original(label).program
    task = find_task(find_trained(name).task)
    data = calibration_of(replace(task, samples=samples), program)
    return Subject(label, program, task, data, minutes, RECOVERY.get(name, ""))


def measure(subject: Subject, methods: dict[str, tuple[str, str]], options: str) -> dict[str, Any]:
    """Measure every method on one model."""
    original = subject.score(subject.run().program)
    trivial = best_trivial(subject.task)
    rows: dict[str, dict[str, Any]] = {}
    for method, (text, train) in methods.items():
        linearize = fitted(text, options, min(FIT_MINUTES, subject.minutes))
        try:
            rows[method] = one(subject, linearize, train, original, trivial, BETWEEN.get(method))
        except XformoptError as error:
            rows[method] = {"pass": linearize, "refused": str(error)}
        print(subject.label, method, rows[method], flush=True)
    return {
        "task": subject.task.name,
        "metric": subject.task.metric,
        "higher_is_better": subject.task.higher_is_better,
        "original": original.value,
        "original_details": original.details,
        "trivial": trivial,
        "methods": rows,
        "gate": gate(subject, {fitted(text, options, GATE_MINUTES) for text, _ in methods.values()}),
    }


def fitted(text: str, options: str, minutes: float) -> str:
    """Return a pass with its options; all but Liger fit something, for so many minutes."""
    return text % (options + ("" if "liger" in text else f",minutes={minutes}"))


def one(
    subject: Subject, linearize: str, train: str, original: Score, trivial: float, between: str | None
) -> dict[str, Any]:
    """Linearize and recover; return the metrics on the way."""
    started = time.perf_counter()
    before = subject.run(linearize)
    fitted = time.perf_counter() - started
    record = before.history[-1]
    recover = [f"recover-accuracy{{minutes={subject.minutes},train={train}{subject.recovery}}}"]
    if between is not None:
        half = f"recover-accuracy{{minutes={subject.minutes / 2},train={train}{subject.recovery}}}"
        recover = [half, between, half]
    started = time.perf_counter()
    after = subject.run(linearize, *recover)
    recovered = time.perf_counter() - started - fitted
    scores = [subject.score(result.program) for result in (before, after)]
    margins = [(score.value - trivial) / (original.value - trivial) for score in scores]
    return {
        "pass": linearize,
        "recovery": ", ".join(recover),
        "layers": record.fired,
        "refusals": [{"reason": reason, "count": count} for reason, count in record.rejected],
        "before": scores[0].value,
        "after": scores[1].value,
        "margin_before": margins[0],
        "margin_after": margins[1],
        "details_after": scores[1].details,
        "seconds": {"linearize": fitted, "recover": recovered},
        "notes": [*record.notes, *after.history[-1].notes],
    }


def best_trivial(task: Task) -> float:
    """Return what the best of the trivial predictors reaches."""
    found = task.baselines().values()
    return max(found) if task.higher_is_better else min(found)


def gate(subject: Subject, passes: set[str]) -> list[dict[str, Any]]:
    """Return what each pass says without force, with this machine's clock, at the task's length and at a short one."""
    clock = partial(measured_times, target=TARGET)
    found = []
    for text in sorted(passes):
        asked = text.replace("force=true,", "").replace("force=true", "")
        for what, data in (("task", subject.samples), (f"{SHORT} tokens", shortened(subject))):
            if data is None:
                continue
            told = replace(subject, samples=data).run(asked, time=clock).history[-1]
            entry = {"pass": asked, "at": what, "layers": told.fired, "refusals": [r for r, _ in told.rejected]}
            found.append({**entry, "notes": list(told.notes)})
            print(subject.label, found[-1], flush=True)
    return found


def shortened(subject: Subject) -> list[dict[str, torch.Tensor]] | None:
    """Return the longest batch cut to a short length, or None where the length is fixed."""
    if "length" not in subject.program.dims:
        return None
    longest = max(subject.samples, key=lambda batch: max(value.shape[1] for value in batch.values()))
    return [{name: value[:, :SHORT] for name, value in longest.items()}]


def main(arguments: Sequence[str]) -> None:
    """Measure the models named on the command line, or all that have not been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="of recovery")
    parser.add_argument("--samples", type=int, default=2000, help="items to learn from")
    parser.add_argument("--method", action="append", help="one of the methods; all where none is named")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of results")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.models if name not in MODELS]:
        parser.error(f"there is no model {unknown[0]!r} here: name {', '.join(MODELS)}")
    for method in given.method or ():
        if not any(method in methods for methods, _ in MODELS.values()):
            parser.error(f"there is no method {method!r}: name {', '.join({**SEQUENCES, **IMAGES})}")
    results = ResultsFile(given.output, "xformopt/linearize/1")
    for name in given.models or [name for name in MODELS if name not in results.entries()]:
        methods, options = MODELS[name]
        picked = {method: value for method, value in methods.items() if method in (given.method or methods)}
        subject = subject_of(name, given.samples, given.minutes)
        found = measure(subject, picked, options)
        # methods that were not asked for keep what the file says of them
        known = results.entries().get(name, {}) if given.method else {}
        asked = {(row["pass"], row["at"]) for row in found["gate"]}
        others = [row for row in known.get("gate", []) if (row["pass"], row["at"]) not in asked]
        found["methods"] = {**known.get("methods", {}), **found["methods"]}
        results.put(name, {**found, "gate": [*others, *found["gate"]]})


if __name__ == "__main__":
    main(sys.argv[1:])
