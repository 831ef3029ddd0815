"""Which units go, so that a budget is met and as much importance as possible stays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from xformopt.analysis import cost
from xformopt.analysis.coupling import Group
from xformopt.errors import PassError
from xformopt.passes.budgets import Budget, meet_latency, used
from xformopt.passes.prune.support.importance import Scores
from xformopt.passes.prune.support.removal import remove_units
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["Allocation", "Selection", "meet_budget", "unit_costs"]

# global: all layers compete; layerwise: every layer loses the same share
Allocation: TypeAlias = Literal["global", "layerwise"]


_ADVICE = "Ask for less, add targets, or remove width or sublayers as well."
# removals asked for, each a little larger, before a budget is given up
_ATTEMPTS = 8


@dataclass(frozen=True)
class _Block:
    """Units of one group that go together: as many as keep the width a round number."""

    group: Group
    units: torch.Tensor
    score: float
    cost: float


def unit_costs(program: Program, groups: Sequence[Group], budget: Budget) -> dict[Group, float]:
    """Return what one unit of each group costs: of FLOPs, what its operators save when half of the units go."""
    if budget == "parameters":
        return {group: _parameters_of_unit(program, group) for group in groups}
    before = {node.name: node.flops for node in cost(program).by_node}
    readers = {node.name: {value.name for value in node.all_input_nodes} for node in program.nodes()}
    found: dict[Group, float] = {}
    # the residual width is read and written by what the others are between: apart, each saves all that it can
    for part in ([g for g in groups if g.kind == "width"], [g for g in groups if g.kind != "width"]):
        halves = {group: torch.arange(group.units) < (group.units + 1) // 2 for group in part}
        after = {node.name: node.flops for node in cost(remove_units(program, halves)).by_node}
        for group in part:
            axes = {name for name, _ in group.values}
            saved = sum(before[name] - after[name] for name in before if name in axes or readers[name] & axes)
            found[group] = saved / max(1, group.units // 2)
    return found


def _parameters_of_unit(program: Program, group: Group) -> float:
    sizes = (program.parameters[name].numel() for name, _ in group.parameters)
    return sum(sizes) / group.units


@dataclass(frozen=True)
class Selection:
    """Blocks of units, and the rule by which they are given up.

    With allocation ``global``, heads and all other units are ranked apart, by importance for what they cost; for every
    number of best heads kept, the best other units fill what is left of the budget; the pair with the largest sum of
    importance wins (Khaki and Plataniotis, arXiv 2403.17921).  With ``layerwise``, the blocks of every group go in the
    same measure.  The best block of every group stays.

    Attributes:
        groups: What is pruned.
        blocks: All blocks that may go, the least important of a group first.
        allocation: See above.

    """

    groups: tuple[Group, ...]
    blocks: tuple[_Block, ...]
    allocation: Allocation

    @staticmethod
    def of(scores: Scores, costs: Mapping[Group, float], multiple: int, allocation: Allocation) -> Selection:
        """Cut the units of every group into blocks, so that the channels left are a multiple of ``multiple``."""
        blocks: list[_Block] = []
        for group, score in scores.items():
            for units in _rounded(group, score, multiple):
                block = _Block(group, units, float(score[units].sum()), costs[group] * len(units))
                # what is worth everything is no candidate
                blocks += [block] if math.isfinite(block.score) else []
        return Selection(tuple(scores), tuple(blocks), allocation)

    @property
    def most(self) -> float:
        """What goes if everything goes that may."""
        return sum(block.cost for block in self.blocks)

    def keep(self, removed: float) -> dict[Group, torch.Tensor]:
        """Return which units stay when at least ``removed`` of the budget goes (or all that may)."""
        gone = self._layerwise(removed) if self.allocation == "layerwise" else self._globally(removed)
        kept = {group: torch.ones(group.units, dtype=torch.bool) for group in self.groups}
        for block in gone:
            kept[block.group][block.units] = False
        return {group: stays for group, stays in kept.items() if not bool(stays.all())}

    def _layerwise(self, removed: float) -> list[_Block]:
        counts = dict.fromkeys(self.groups, 0)
        totals = {group: sum(block.group is group for block in self.blocks) for group in self.groups}
        place: dict[int, float] = {}
        for index, block in enumerate(self.blocks):
            counts[block.group] += 1
            place[index] = counts[block.group] / totals[block.group]
        order = sorted(place, key=lambda index: place[index])
        return _until([self.blocks[index] for index in order], removed)

    def _globally(self, removed: float) -> list[_Block]:
        heads, others = (
            sorted(
                (block for block in self.blocks if (block.group.kind == "heads") == is_head),
                key=lambda block: block.score / max(block.cost, 1e-9),
            )
            for is_head in (True, False)
        )
        best: tuple[float, list[_Block]] | None = None
        for count in range(len(heads) + 1):
            saved = sum(block.cost for block in heads[:count])
            gone = heads[:count] + _until(others, removed - saved)
            if sum(block.cost for block in gone) >= removed or len(gone) == len(self.blocks):
                lost = sum(block.score for block in gone)
                if best is None or lost < best[0]:
                    best = (lost, gone)
        assert best is not None
        return best[1]


def _rounded(group: Group, score: torch.Tensor, multiple: int) -> list[torch.Tensor]:
    """Cut all but the last block of a group's units off, the least important first."""
    channels = max(1, group.entries_per_unit)
    step = next((count for count in range(1, multiple + 1) if count * channels % multiple == 0), 1)
    order = score.argsort(stable=True)
    first = group.units % step or step
    blocks = [order[:first], *order[first:].split(step)] if first < group.units else []
    return [block for block in blocks[:-1] if len(block)]


def _until(blocks: Sequence[_Block], removed: float) -> list[_Block]:
    """Take blocks from the front until their cost reaches ``removed``, or all."""
    taken: list[_Block] = []
    total = 0.0
    for block in blocks:
        if total >= removed:
            break
        taken.append(block)
        total += block.cost
    return taken


def meet_budget(
    program: Program, selection: Selection, share: float, budget: Budget, context: Context
) -> dict[Group, torch.Tensor]:
    """Return which units stay so that ``share`` of the budget goes.

    Raises:
        PassError: it cannot be met; the message has the best that was reached.

    """
    if budget == "latency":
        return meet_latency(
            program,
            share,
            context,
            lambda part: selection.keep(part * selection.most),
            lambda kept: remove_units(program, kept),
            "the best block left in every layer",
            _ADVICE,
        )
    whole = used(program, budget)
    wanted = asked = share * whole
    for _ in range(_ATTEMPTS):
        kept = selection.keep(asked)
        removed = whole - used(remove_units(program, kept), budget)
        if removed >= wanted:
            return kept
        if asked >= selection.most:
            break
        # units of neighbouring groups that share a weight save less together than apart
        asked += 1.02 * (wanted - removed)
    raise PassError(
        f"The budget cannot be met: {share:.0%} of the {budget} are to go, and with the best block left in every layer "
        f"{removed / whole:.1%} can. {_ADVICE}"
    )
