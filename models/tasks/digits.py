"""Handwritten digits: the 1,797 images of 8x8 pixels that come with scikit-learn, drawn at 32x32.

Data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(its test part).  Five folds in a fixed order, every class shared out evenly; a model is judged on the fold that it was
trained without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import nn

from xformopt.errors import MissingExtraError
from xformopt.models.tasks.classification import Classification
from xformopt.models.tasks.task import Batch

__all__ = ["SIZE", "Digits"]

SIZE = 32
_FOLDS = 5
_SEED = 0
_ROWS = 60
_CALIBRATION_ITEMS, _CALIBRATION_ROWS = 240, 16
_VALIDATION_ITEMS = 240
# of all pixels, so that the inputs have about mean 0 and deviation 1
MEAN, DEVIATION = 0.3053, 0.35


@dataclass(frozen=True)
class Digits(Classification):
    """Which digit an image shows."""

    name: ClassVar[str] = "digits"
    summary: ClassVar[str] = "handwritten digits at 32x32: 1,797 images in five folds"
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    folds: ClassVar[int] = _FOLDS

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Return images of the training folds, as they are; 240 where not told otherwise."""
        images, _ = self.training()
        chosen = images[: self.samples or _CALIBRATION_ITEMS]
        return [{"pixel_values": rows} for rows in chosen.split(_CALIBRATION_ROWS)]

    def test(self) -> Iterator[Batch]:
        """Yield the images of the held-out fold, sixty at a time."""
        images, labels = _images()
        held_out = _fold_of(labels) == self.fold
        for rows, answers in zip(images[held_out].split(_ROWS), labels[held_out].split(_ROWS), strict=True):
            yield Batch({"pixel_values": rows}, {"label": answers})

    def validation(self) -> Iterator[Batch]:
        """Yield the last images of the training folds, as far as they are not calibration data."""
        images, labels = self.training()
        first = max(self.samples or _CALIBRATION_ITEMS, len(images) - _VALIDATION_ITEMS)
        for rows, answers in zip(images[first:].split(_ROWS), labels[first:].split(_ROWS), strict=True):
            if len(rows):
                yield Batch({"pixel_values": rows}, {"label": answers})

    def training(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images ``[N, 1, 32, 32]`` and labels ``[N]`` of the other folds."""
        images, labels = _images()
        kept = _fold_of(labels) != self.fold
        return images[kept], labels[kept]

    def baselines(self) -> dict[str, float]:
        """Return the accuracy of the commonest class, and of the class whose mean image is nearest."""
        images, labels = self.training()
        test = list(self.test())
        shown = torch.cat([batch.inputs["pixel_values"] for batch in test])
        wanted = torch.cat([batch.targets["label"] for batch in test])
        means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
        nearest = torch.cdist(shown.flatten(1), means.flatten(1)).argmin(1)
        return {
            "commonest class": float((wanted == labels.mode().values).double().mean()),
            "nearest class mean": float((wanted == nearest).double().mean()),
        }


@cache
def _images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images ``[1797, 1, 32, 32]``, normalized, and their labels ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "tasks", 'The task "digits"') from error
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    drawn = nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (drawn - MEAN) / DEVIATION, torch.tensor(found.target, dtype=torch.int64)


def _fold_of(labels: torch.Tensor) -> torch.Tensor:
    """Return the fold of every item: the items of each class, shuffled, are dealt out in turn."""
    generator = torch.Generator().manual_seed(_SEED)
    folds = torch.empty_like(labels)
    dealt = 0
    for digit in labels.unique():
        members = (labels == digit).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        # each class begins where the last one ended, so that the folds are of one size
        folds[members] = (torch.arange(len(members)) + dealt) % _FOLDS
        dealt += len(members)
    return folds
