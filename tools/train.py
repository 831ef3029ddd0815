"""Train a model of a task again from nothing, and judge it on what it has not seen.

    python tools/train.py digits-vit                 all folds, one after the other; writes their checkpoints
    python tools/train.py digits-vit --fold 2        one of them
    python tools/train.py digits-vit --check         train again beside the checkpoints, and compare
    python tools/train.py digits-vit --judge         judge the checkpoints that are there, train nothing

One thread, whatever the machine has: sums in another order would end in other weights.  Folds may be trained side by
side, each by a process of its own.  In time of a core, a fold of digits-pvt takes a minute, forecast-patchtst two and
pycode-gpt about sixteen.  A tenth of the way at a time, what there is goes to a file ``NAME.partial`` beside the
checkpoint, which appears only when it is done.

What is reproduced, and how exactly: the same machine and versions end in the same weights.  Another processor rounds
differently, training amplifies that, and the metric lands elsewhere within its own spread.  ``--check`` therefore ends
with status 1 when the metric of the model trained again differs from that of the checkpoint by more than the model's
tolerance: half a point of accuracy on the digits, two points on recall and listops, 0.02 bits per byte on
pycode, 0.01 of the mean squared error on forecast (``Trained.tolerance``).  The tolerance is for all folds together; n
of N have sqrt(N / n) times the room, since they have so many fewer items.  What a check of all folds finds is kept in
tools/results/retraining.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))
from results_file import FOLDER, ResultsFile

from xformopt.errors import XformoptError
from xformopt.models.checkpoint import load_checkpoint, save_checkpoint
from xformopt.models.trained import Trained
from xformopt.models.zoo import find_trained
from xformopt.tasks import find_task

# metric and number of items of one fold
Result = tuple[float, int]

RESULTS = ResultsFile(FOLDER / "retraining.json", "xformopt/retraining/1")


def train(model: Trained) -> Result:
    """Train one fold, write its checkpoint, and judge that."""
    partial = model.path.with_suffix(".partial")
    module = trained_again(model, lambda module: save_checkpoint(module, partial))
    save_checkpoint(module, model.path)
    partial.unlink(missing_ok=True)
    return judge(model)


def trained_again(model: Trained, keep: Callable[[nn.Module], None] = lambda module: None) -> nn.Module:
    """Return the module of one fold, trained from nothing; ``keep`` gets what there is a tenth of the way at a time."""
    module, started, worked, shown = model.fresh(), time.monotonic(), time.process_time(), 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        if done % max(total // 10, 1) == 0 and done < total:
            keep(module)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{model.label}: {what}, step {done} of {total}, {shown - started:.0f} s", flush=True)

    model.train(module, model.fold, progress)
    spent, worked = time.monotonic() - started, time.process_time() - worked
    print(f"{model.label}: {spent:.0f} s, {worked:.0f} s of a core", flush=True)
    return module


def judge(model: Trained) -> Result:
    """Judge a stored checkpoint on its own fold."""
    return judged(model, model.build(), model.label)


def judged(model: Trained, module: nn.Module, what: str) -> Result:
    """Return the metric of a module on the fold that it has not seen, and of how many items."""
    task = find_task(model.task, fold=model.fold)
    score = task.evaluate(lambda inputs: module(**inputs))
    print(f"{what}: {task.metric} {score.value:.4f} on {score.count} items, {score.details}", flush=True)
    return score.value, score.count


def check(model: Trained) -> tuple[Result, Result]:
    """Train one fold again and leave its checkpoint alone; return what both reach.

    What is judged has gone through a checkpoint too, whose weights have 16 bits.
    """
    stored = judge(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model.path.name
        save_checkpoint(trained_again(model), path)
        module = load_checkpoint(model.fresh(), path).eval()
    return stored, judged(model, module, f"{model.label}, trained again")


def compare(model: Trained, pairs: list[tuple[Result, Result]]) -> dict[str, Any]:
    """Compare the folds that were trained again with their checkpoints, as the tolerance asks."""
    stored, again = mean([found for found, _ in pairs]), mean([found for _, found in pairs])
    room = model.tolerance * math.sqrt(model.folds / len(pairs))
    agrees = abs(again - stored) <= room
    verdict = "reproduced" if agrees else "NOT reproduced"
    print(f"{model.name}: {verdict}: differs by {again - stored:+.4f}, may differ by {room:.4f}, on {len(pairs)} folds")
    return {
        "task": model.task,
        "folds": [{"stored": found[0], "again": other[0], "items": found[1]} for found, other in pairs],
        "stored": stored,
        "again": again,
        "tolerance": room,
        "reproduced": agrees,
    }


def mean(results: list[Result]) -> float:
    """Return the metric of all items."""
    return sum(value * count for value, count in results) / sum(count for _, count in results)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("name")
    parser.add_argument("--fold", type=int)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="train again beside the checkpoints, and compare")
    instead.add_argument("--judge", action="store_true", help="judge the checkpoints, train nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        model = find_trained(given.name)
        folds = [model.on_fold(fold) for fold in (range(model.folds) if given.fold is None else [given.fold])]
        if given.check:
            found = compare(model, [check(fold) for fold in folds])
            if len(folds) == model.folds:
                RESULTS.put(model.name, found)
            return 0 if found["reproduced"] else 1
        results = [judge(fold) if given.judge else train(fold) for fold in folds]
    except XformoptError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{model.name}: {mean(results):.4f} over {sum(count for _, count in results)} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
