"""Tasks whose answer is a class: accuracy, and how far a model's logits have moved from those of its original."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from xformopt.models.tasks.task import Batch, Progress, Run, Score, Task, Tensors

__all__ = ["Classification", "divergence"]


@dataclass(frozen=True)
class Classification(Task):
    """A task with one class per item: ``targets["label"]`` is ``[N]``, the judged output ``[N, classes]`` logits."""

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    output: ClassVar[str] = "logits"

    def judge(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, None]:
        """Return 1 for each item whose largest logit is its label's, else 0."""
        return (output.argmax(1) == batch.targets["label"]).double(), None

    def compare(
        self,
        run: Run,
        original: Run,
        progress: Progress = lambda what, done, total: None,
        batches: Iterable[Batch] | None = None,
    ) -> Score:
        """Add ``logit_kl``, the mean over items of KL(original || model) in nats, and ``agreement``, the share of items
        on which both answer the same.
        """
        moved: list[torch.Tensor] = []
        same: list[torch.Tensor] = []

        def watched(inputs: Tensors) -> Tensors:
            outputs = run(inputs)
            logits = outputs[self.output]
            wanted = logits if run is original else original(inputs)[self.output]
            moved.append(divergence(wanted, logits))
            same.append((wanted.argmax(1) == logits.argmax(1)).double())
            return outputs

        score = self.evaluate(watched, progress, batches)
        details = {"logit_kl": float(torch.cat(moved).mean()), "agreement": float(torch.cat(same).mean())}
        return replace(score, details={**score.details, **details})


def divergence(wanted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(wanted) || softmax(logits)) in nats, of ``[N, classes]`` each; ``[N]`` float64."""
    p, q = wanted.double().log_softmax(1), logits.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)
