"""What a program answers, as a distribution, so that two answers can be compared without labels.

The first floating-point output counts, on valid positions.  Where it is called logits, its last axis holds the logits
of a class; any other output is the mean of a normal distribution of unit variance, whose divergence is half the squared
distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xformopt.errors import DataError
from xformopt.program import Program, valid_positions

__all__ = ["Answer", "answer_of", "rows_of", "valid_rows"]


@dataclass(frozen=True)
class Answer:
    """One answer for each row, ``[..., N, C]``: logits, or means."""

    rows: torch.Tensor
    are_logits: bool

    def divergence(self, other: Answer, temperature: float = 1.0) -> torch.Tensor:
        """Return ``T^2 KL(self || other)`` at the temperature, the mean over rows, ``[...]`` float64."""
        one, two = self.rows.double(), other.rows.double()
        if not self.are_logits:
            return (one - two).square().sum(-1).mean(-1) / 2
        p, q = ((rows / temperature).log_softmax(-1) for rows in (one, two))
        return temperature**2 * (p.exp() * (p - q)).sum(-1).mean(-1)

    def log_likelihood_of_draws(self, generator: torch.Generator) -> torch.Tensor:
        """Return the log-likelihood of an answer drawn for each row, summed; differentiable by the rows alone."""
        known = self.rows.detach()
        if self.are_logits:
            drawn = torch.multinomial(known.softmax(-1), 1, generator=generator)
            return self.rows.log_softmax(-1).gather(-1, drawn).sum()
        noise = torch.randn(known.shape, generator=generator, dtype=known.dtype)
        return -(known + noise - self.rows).square().sum() / 2

    def agreement(self, other: Answer) -> float:
        """Return the share of rows with the same largest entry; of means, one less the relative distance."""
        if self.are_logits:
            return float((self.rows.argmax(-1) == other.rows.argmax(-1)).double().mean())
        return 1 - float((self.rows - other.rows).norm() / self.rows.norm())


def answer_of(program: Program, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> Answer:
    """Return the answer in a program's outputs, ``[N, C]``.

    Raises:
        DataError: it returns no floating-point value.

    """
    for spec, node in zip(program.outputs, program.results, strict=True):
        if outputs[spec.name].is_floating_point():
            rows = valid_rows(program, node.meta["val"], outputs[spec.name], batch)
            return Answer(rows, "logits" in spec.name)
    raise DataError(f"The program {program.name!r} returns no floating-point value, so that no change can be measured.")


def valid_rows(
    program: Program, known: torch.Tensor, value: torch.Tensor, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the valid positions of ``[..., C]`` as rows ``[N, C]``; ``known`` is the value's fake tensor."""
    return rows_of(value, valid_positions(program, known, batch))


def rows_of(value: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return ``[..., C]`` as rows ``[N, C]``: all, or those of the positions that are valid."""
    if valid is not None and valid.shape[-1] == 1:
        value = value[valid.expand(*value.shape[:-1], 1).squeeze(-1)]
    return value.reshape(-1, value.shape[-1])
