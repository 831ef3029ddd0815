"""The importance of units by any criterion, and which units the data says nothing about."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xformopt.analysis.coupling import Group
from xformopt.passes.prune.support.importance import (
    Importance,
    Scores,
    activation_energy,
    magnitude,
    read_values,
    taylor,
    wanda,
)
from xformopt.passes.prune.support.optin import optin
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["score_units"]


def score_units(
    program: Program, groups: Sequence[Group], importance: Importance, context: Context, *, together: int = 1
) -> tuple[Scores, dict[Group, torch.Tensor]]:
    """Return the importance of every unit, and which units of a group (bool) the calibration data never excites.

    Args:
        program: A lifted program.
        groups: Of it; linear layers read each.
        importance: The criterion.
        context: Has the calibration data, which all criteria but magnitude look at.
        together: See :func:`xformopt.passes.prune.support.optin.optin`.

    Raises:
        DataError: there is no calibration data.

    """
    if importance == "magnitude":
        return magnitude(program, groups), {}
    batches = context.calibration
    names = [source.name for group in groups for _, source, _ in read_values(program, group)]
    energy = activation_energy(program, batches, names, context.progress)
    scores = wanda(program, groups, energy)
    if importance == "taylor":
        scores = taylor(program, groups, batches, context.seed, context.progress)
    if importance == "optin":
        scores = optin(
            program,
            groups,
            batches,
            together=together,
            order=scores,
            seed=context.seed,
            progress=context.progress,
        )
    silent = {}
    for group in groups:
        excited = torch.zeros(group.units, dtype=torch.float64)
        for _, source, units in read_values(program, group):
            excited.index_add_(0, units, energy[source.name])
        if not bool(excited.all()):
            silent[group] = excited == 0
    return scores, silent
