"""What the zoo knows of one trained model: its task, its configuration, its checkpoints, and how they came to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from xformopt.errors import UsageError
from xformopt.models.checkpoint import load_checkpoint

__all__ = ["CHECKPOINTS", "Trained", "Trainer"]

CHECKPOINTS = Path(__file__).parent / "tasks" / "checkpoints"
_SEED = 0

Progress = Callable[[str, int, int], None]
# trains a fresh module in place on everything but one fold
Trainer = Callable[[nn.Module, int, Progress], None]


@dataclass(frozen=True)
class Trained:
    """One trained model; a task's file lists its own in ``TRAINED``.

    Attributes:
        name: What the command line calls it: the task, a dash, the architecture (``digits-vit``).
        task: The name of its task.
        module: Builds it with fresh weights, in its configuration; the module has ``example_inputs()``.
        train: Trains a fresh module: ``train(module, fold, progress)``; deterministic.
        sources: The publications that define the architecture.
        summary: One line for a listing.
        folds: How many checkpoints there are, each trained without one fold of the task's data; a single one without
            the first.
        fold: Which of them this is; the part of the data it has not seen.
        tolerance: How far the metric of a model trained again, over all folds, may lie from that of the checkpoints; by
            default half a point of accuracy.

    """

    name: str
    task: str
    module: Callable[[], nn.Module]
    train: Trainer
    sources: tuple[str, ...]
    summary: str
    folds: int = 1
    fold: int = 0
    tolerance: float = 0.005

    @property
    def label(self) -> str:
        """The name with the fold, as the command line takes it: ``digits-vit{fold=2}``; the first goes without."""
        return f"{self.name}{{fold={self.fold}}}" if self.fold else self.name

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        return CHECKPOINTS / (f"{self.name}-{self.fold}.safetensors" if self.folds > 1 else f"{self.name}.safetensors")

    def on_fold(self, fold: int) -> Trained:
        """Return the model that was trained without ``fold``.

        Raises:
            UsageError: there is no such fold.

        """
        if not 0 <= fold < self.folds:
            has = f"folds 0 to {self.folds - 1}" if self.folds > 1 else "a single checkpoint, fold 0"
            raise UsageError(f"The model {self.name} has no fold {fold}: it has {has}.")
        return replace(self, fold=fold)

    def fresh(self, seed: int = _SEED) -> nn.Module:
        """Return the module with untrained weights, drawn from ``seed``; the global generator is left alone."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.module()

    def build(self) -> nn.Module:
        """Return the module in inference mode with its trained weights.

        Raises:
            DataError: the checkpoint is missing, damaged, or of another configuration.

        """
        return load_checkpoint(self.fresh(), self.path).eval().requires_grad_(False)
