"""How far a program's values are from those of the original: what recovery trains, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from xformopt.passes.answers import Answer, answer_of, rows_of, valid_rows
from xformopt.program import Program, interpret
from xformopt.reconstruction import Attempt

__all__ = ["Distillation", "agreement", "distance"]

_TINY = 1e-30


@dataclass(frozen=True)
class Distillation:
    """The loss of an attempt: distances of the outputs, and the mean relative distance of hidden values.

    Attributes:
        logits: Values that are logits.
        others: Other values that are returned.
        residual: Sums on the residual stream.
        temperature: Of the softmax over logits.
        hidden: What the residual stream counts.

    """

    logits: tuple[str, ...]
    others: tuple[str, ...]
    residual: tuple[str, ...]
    temperature: float
    hidden: float

    def __call__(self, attempt: Attempt) -> torch.Tensor:
        """Return the loss, a float64 scalar."""
        found = attempt.run(None)
        pairs = {name: tuple(rows_of(given[name], attempt.valid.get(name)) for given in (attempt.wanted, found))
                 for name in (*self.logits, *self.others, *self.residual)}  # fmt: skip
        total = torch.zeros((), dtype=torch.float64)
        for name in self.logits:
            wanted, have = (Answer(rows, True) for rows in pairs[name])
            total = total + wanted.divergence(have, self.temperature)
        for name in self.others:
            total = total + _relative(*pairs[name])
        if self.hidden:
            for name in self.residual:
                total = total + self.hidden / len(self.residual) * _relative(*pairs[name])
        return total


def _relative(wanted: torch.Tensor, have: torch.Tensor) -> torch.Tensor:
    return (have - wanted).square().sum() / wanted.square().sum().clamp(min=_TINY)


def agreement(original: Program, program: Program, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Return the mean agreement of a program's answers with the original's, over batches."""
    total = 0.0
    for batch in batches:
        wanted, have = (answer_of(which, interpret(which, batch), batch) for which in (original, program))
        total += wanted.agreement(have)
    return total / len(batches)


def distance(original: Program, program: Program, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Return the largest relative squared distance of any output from the original's, on any batch."""
    largest = 0.0
    for batch in batches:
        wanted, have = (interpret(which, batch) for which in (original, program))
        for spec, node in zip(original.outputs, original.results, strict=True):
            rows = [valid_rows(original, node.meta["val"], given[spec.name], batch) for given in (wanted, have)]
            largest = max(largest, float(_relative(rows[0].double(), rows[1].double())))
    return largest
