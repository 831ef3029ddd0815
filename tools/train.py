"""Train a model of a task again from nothing, and judge it on what it has not seen.

    python tools/train.py digits-vit                 all folds, one after the other
    python tools/train.py digits-vit --fold 2        one of them
    python tools/train.py digits-vit --check         judge the checkpoints that are there, train nothing

One thread, whatever the machine has: sums in another order would end in other weights.  Folds may be trained side by
side, each by a process of its own.  A tenth of the way at a time, what there is goes to a file ``NAME.partial`` beside
the checkpoint, which appears only when it is done.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from xformopt.errors import XformoptError
from xformopt.models.checkpoint import save_checkpoint
from xformopt.models.trained import Trained
from xformopt.models.zoo import find_trained
from xformopt.tasks import find_task


def train(model: Trained) -> None:
    """Train one fold and write its checkpoint."""
    module, started, shown = model.fresh(), time.monotonic(), 0.0
    partial = model.path.with_suffix(".partial")

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        if done % max(total // 10, 1) == 0 and done < total:
            save_checkpoint(module, partial)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{model.label}: {what}, step {done} of {total}, {shown - started:.0f} s", flush=True)

    model.train(module, model.fold, progress)
    save_checkpoint(module, model.path)
    partial.unlink(missing_ok=True)
    print(f"{model.label}: {time.monotonic() - started:.0f} s", flush=True)


def judge(model: Trained) -> tuple[float, int]:
    """Return the metric of a stored checkpoint on its own fold, and of how many items."""
    task, module = find_task(model.task, fold=model.fold), model.build()
    score = task.evaluate(lambda inputs: module(**inputs))
    print(f"{model.label}: {task.metric} {score.value:.4f} on {score.count} items, {score.details}", flush=True)
    return score.value, score.count


def main(arguments: list[str] | None = None) -> int:
    """Train and judge what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("name")
    parser.add_argument("--fold", type=int)
    parser.add_argument("--check", action="store_true", help="train nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        model = find_trained(given.name)
        folds = range(model.folds) if given.fold is None else [given.fold]
        scores = []
        for fold in folds:
            if not given.check:
                train(model.on_fold(fold))
            scores.append(judge(model.on_fold(fold)))
    except XformoptError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return error.exit_status
    items = sum(count for _, count in scores)
    print(f"{model.name}: {sum(value * count for value, count in scores) / items:.4f} over {items} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
