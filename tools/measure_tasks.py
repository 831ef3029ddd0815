"""What every trained model reaches on its task, in eager fp32 and on ort-cpu after the exact recipe.

    python tools/measure_tasks.py [MODEL ...]      writes tools/results/tasks.json

A model with several checkpoints is judged with each on the fold it has not seen, and the items of all folds count
together.  A model that is in the file already, measured with the same checkpoints, is passed over unless it is named.
Exact passes may move the metric by a tenth of a point: beyond that the program says so, and ends with status 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xformopt import api
from xformopt.capture.resolve import MINILM
from xformopt.evaluation import Evaluation
from xformopt.measure.machine import describe_machine
from xformopt.measure.statistics import paired_difference
from xformopt.models.trained import Trained
from xformopt.models.zoo import find_trained, trained
from xformopt.tasks import task_for

RESULTS = Path(__file__).parent / "results" / "tasks.json"
TARGET = "ort-cpu"
_RETRIEVAL = "retrieval"
_TOLERANCE = 0.001


def measure(name: str) -> dict[str, Any]:
    """Judge one model on every fold; its eager self and the lowered one see the same items."""
    found = []
    for label in labels(name):
        task = task_for(_RETRIEVAL if name == MINILM else find_trained(name).task, label)
        made = api.optimize(label, target=TARGET, task=task, bench=False, measure_lowering=False)
        if made.evaluation is not None and made.evaluation.baseline is not None:
            found.append(made.evaluation)
            print(label, f"{made.evaluation.baseline.value:.4f} -> {made.evaluation.score.value:.4f}", flush=True)
    return summary(found)


def labels(name: str) -> list[str]:
    """Return the MODEL strings of all folds."""
    if name == MINILM:
        return [MINILM]
    model = find_trained(name)
    return [model.on_fold(fold).label for fold in range(model.folds)]


def summary(found: Sequence[Evaluation]) -> dict[str, Any]:
    """Take the items of all folds together."""
    task = found[0].task
    pairs = [(each.task.fold, each.baseline, each.score) for each in found if each.baseline is not None]
    before, after = torch.cat([b.items for _, b, _ in pairs]), torch.cat([a.items for _, _, a in pairs])
    weights = torch.cat(
        [each.score.weights if each.score.weights is not None else torch.ones_like(each.score.items) for each in found]
    )
    eager, lowered = (float((items * weights).sum() / weights.sum()) for items in (before, after))
    interval = paired_difference(before.tolist(), after.tolist(), weights.tolist())
    return {
        "task": task.name,
        "metric": task.metric,
        "count": len(after),
        "eager": eager,
        TARGET: lowered,
        "difference": lowered - eager,
        "difference_ci95": [interval.low, interval.high] if interval else None,
        "details": pooled([each.score.details for each in found], found),
        "trivial": pooled([each.task.baselines() for each in found], found),
        "folds": [{"fold": fold, "eager": b.value, TARGET: a.value} for fold, b, a in pairs],
    }


def pooled(parts: Sequence[dict[str, float]], found: Sequence[Evaluation]) -> dict[str, float]:
    """Return the means of named figures, each fold weighted by its items."""
    items = [each.score.count for each in found]
    return {name: sum(p[name] * n for p, n in zip(parts, items, strict=True)) / sum(items) for name in parts[0]}


def checkpoints_of(name: str) -> str | None:
    """Return a hash of a model's checkpoints, or None where they come from elsewhere."""
    if name == MINILM:
        return None
    model: Trained = find_trained(name)
    data = b"".join(model.on_fold(fold).path.read_bytes() for fold in range(model.folds))
    return hashlib.sha256(data).hexdigest()[:16]


def measured() -> dict[str, Any]:
    """Return what the file of results holds so far, by model."""
    models: dict[str, Any] = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    return models


def main() -> int:
    """Measure the models named on the command line, or all that have not been measured."""
    known = measured()
    for name in sys.argv[1:] or [*trained(), MINILM]:
        digest = checkpoints_of(name)
        if not sys.argv[1:] and name in known and known[name]["checkpoints"] == digest:
            continue
        found = {**measure(name), "checkpoints": digest}
        # read again: another process may have measured another model meanwhile
        known = {**measured(), name: found}
        RESULTS.parent.mkdir(exist_ok=True)
        text = {"schema": "xformopt/tasks/1", "machine": vars(describe_machine()), "models": known}
        RESULTS.write_text(json.dumps(text, indent=1, default=str) + "\n")
    moved = [name for name, each in known.items() if abs(each["difference"]) > _TOLERANCE]
    print(f"moved by more than {_TOLERANCE}: {', '.join(moved)}" if moved else "no metric has moved")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
