"""Choosing one option for each of several things, so that little is paid and little is lost.

The multiple-choice knapsack problem (Sinha and Zoltners, 1979): thing i has options (cost, loss), costs and losses add
up, and of all selections only the undominated ones matter: no other costs less and loses less.  They are built up thing
after thing; a prefix that another prefix dominates is part of no better whole, so that dropping it loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Selection", "undominated"]

# beyond this many prefixes, evenly spaced ones are kept: what is found then is near the best
_MOST_PREFIXES = 20_000


@dataclass(frozen=True)
class Selection:
    """One option of each thing, by its index, and what all of them cost and lose together."""

    cost: float
    loss: float
    options: tuple[int, ...]


@dataclass(frozen=True)
class _Stage:
    """Undominated prefixes up to one thing: each is a prefix of the stage before (``parent``) and an option."""

    cost: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]
    parent: npt.NDArray[np.int64]
    option: npt.NDArray[np.int64]


def undominated(things: Sequence[Sequence[tuple[float, float]]]) -> list[Selection]:
    """Return the undominated selections, cheapest first, so that their losses fall.

    Args:
        things: The options of each thing as (cost, loss), at least one of each.

    """
    start = np.zeros(1)
    stages = [_Stage(start, start, np.zeros(1, np.int64), np.zeros(1, np.int64))]
    for options in things:
        stages.append(_extended(stages[-1], options))
    last = stages[-1]
    return [
        Selection(float(last.cost[index]), float(last.loss[index]), _traced(stages, index))
        for index in range(len(last.cost))
    ]


def _extended(stage: _Stage, options: Sequence[tuple[float, float]]) -> _Stage:
    count = len(stage.cost)
    cost = np.concatenate([stage.cost + paid for paid, _ in options])
    loss = np.concatenate([stage.loss + lost for _, lost in options])
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    # of those that cost no more, only one that loses less than all of them stays
    stays = np.ones(len(order), bool)
    stays[1:] = loss[order][1:] < best[:-1]
    kept = order[stays]
    if len(kept) > _MOST_PREFIXES:
        kept = kept[np.linspace(0, len(kept) - 1, _MOST_PREFIXES).round().astype(np.int64)]
    return _Stage(cost[kept], loss[kept], kept % count, kept // count)


def _traced(stages: Sequence[_Stage], index: int) -> tuple[int, ...]:
    options = []
    for stage in reversed(stages[1:]):
        options.append(int(stage.option[index]))
        index = int(stage.parent[index])
    return tuple(reversed(options))
