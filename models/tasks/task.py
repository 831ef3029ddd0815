"""What a task is: data in a fixed split, a metric, and the score of whatever runs a model on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

__all__ = ["Batch", "Progress", "Run", "Score", "Task"]

Tensors = Mapping[str, torch.Tensor]
# a model, however it is executed: named tensors in, named tensors out
Run = Callable[[Tensors], Tensors]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Batch:
    """Some test items: what the model is given, and what it is judged by.

    Attributes:
        inputs: Named inputs, the first axis over items.
        targets: What :meth:`Task.judge` compares the outputs with.

    """

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Score:
    """What a model reached on a task.

    Attributes:
        value: The mean of ``items`` (weighted by ``weights``).
        items: ``[N]`` float64, one per test item in the task's order, so that two models can be compared in pairs.
        weights: ``[N]``, what each item counts; None where all count the same.
        details: Further figures by name.

    """

    value: float
    items: torch.Tensor
    weights: torch.Tensor | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many test items there are."""
        return len(self.items)


@dataclass(frozen=True)
class Task(ABC):
    """A task; a user's own is a subclass with the class attributes and three methods, named ``package.module:Class``.

    The fields are its options on the command line: ``digits{fold=2}``.

    Attributes:
        fold: Which of the ``folds`` is held out as test split.
        samples: Items of calibration data, as far as the training split has so many; None: the task's own number.
        name: What the command line calls it.
        summary: One line for a listing.
        metric: What ``value`` of a score is called.
        higher_is_better: Which way the metric points.
        inputs: Names of the inputs that every batch holds.
        output: Name of the output that is judged.
        folds: Into how many test splits the data is divided.

    """

    fold: int = 0
    samples: int | None = None

    name: ClassVar[str]
    summary: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    inputs: ClassVar[tuple[str, ...]]
    output: ClassVar[str]
    folds: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.fold < self.folds:
            raise ValueError(f"fold must be 0 to {self.folds - 1}, but is {self.fold}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, but is {self.samples}")

    @abstractmethod
    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return batches of inputs from the training split, the same every time; lossy passes see only these.

        A task with much data of its own returns as many items as ``samples`` asks for.
        """

    @abstractmethod
    def test(self) -> Iterator[Batch]:
        """Yield the test split in a fixed order."""

    @abstractmethod
    def judge(self, output: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the score of each item ``[N]``, and what each counts (None: the same)."""

    def validation(self) -> Iterator[Batch]:
        """Yield items with targets that are neither tested nor calibration data, for passes that choose by the score.

        A model may have been trained on them.  A task that has none leaves this out.
        """
        return iter(())

    def baselines(self) -> dict[str, float]:
        """Return what trivial predictors reach, by name."""
        return {}

    def compare(
        self,
        run: Run,
        original: Run,
        progress: Progress = lambda what, done, total: None,
        batches: Iterable[Batch] | None = None,
    ) -> Score:
        """Run a model over batches (None: the test split), with the model it was made from beside it.

        A task that measures how far a model has moved from its original adds that to the details, or scores by it; the
        original may be ``run`` itself.
        """
        return self.evaluate(run, progress, batches)

    def evaluate(
        self,
        run: Run,
        progress: Progress = lambda what, done, total: None,
        batches: Iterable[Batch] | None = None,
    ) -> Score:
        """Run a model over batches (None: the test split)."""
        items: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        judged = list(self.test() if batches is None else batches)
        for done, batch in enumerate(judged):
            progress(f"evaluating {self.name}", done, len(judged))
            with torch.no_grad():
                output = run(batch.inputs)[self.output]
            scored, counted = self.judge(output, batch)
            items.append(scored.double())
            weights.append(torch.ones_like(items[-1]) if counted is None else counted.double())
        progress(f"evaluating {self.name}", len(judged), len(judged))
        scores, counts = torch.cat(items), torch.cat(weights)
        value = float((scores * counts).sum() / counts.sum())
        return Score(value, scores, None if bool((counts == 1).all()) else counts)
