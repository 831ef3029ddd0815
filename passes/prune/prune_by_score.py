"""Remove what the task's own score can do without, from coarse to fine (AxFormer).

Elements are visited greedily: whole sublayers, then heads, then parts of FFNs, in each case from the last layer to the
first, a layer's least important units first (by Wanda's measure).  One is removed, the program judged, and the removal
kept only if the score does not fall below the best so far less a tolerance:

    keep the removal  if  score(without) >= best - tolerance;    best = max(best, score(without))

The gate is the score, never a budget: what the score cannot do without stays, however slow.  The score is that of the
user's task (``--task``; ``score=...`` of ``Pipeline.run``) on items that are neither tested nor calibration data; a
metric that is better the lower counts by its negative.  A model that was trained on those items has little to gain
there, and a ``tolerance`` is then what makes room.  Without a task, the score is the agreement with the original's
answers on calibration data (``answers.py``), which can never rise above 1.  **Approximate**, without training.

Nagarajan et al., "AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more Accurate NLP
Models", arXiv 2010.03688.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from xformopt.analysis.coupling import Group, find_groups
from xformopt.errors import PassError
from xformopt.passes.answers import answer_of
from xformopt.passes.budgets import used
from xformopt.passes.prune.support.importance import require_batches
from xformopt.passes.prune.support.removal import refuse_fused, remove_units
from xformopt.passes.prune.support.unit_scores import score_units
from xformopt.passes.sublayers import find_sublayers, remove_sublayers
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, interpret

__all__ = ["PruneByScore"]

_LEVELS = ("sublayers", "heads", "hidden")


@dataclass(frozen=True)
class PruneByScore(Pass):
    """Remove sublayers, heads and parts of FFNs for as long as the task's score holds.

    Attributes:
        tolerance: How far the score may fall below the best one met, in the score's own unit.
        levels: What is tried, in this order: sublayers, heads, hidden (parts of FFNs).
        parts: Into how many parts an FFN is cut.

    """

    tolerance: float = 0.0
    levels: tuple[str, ...] = _LEVELS
    parts: int = 4

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Nagarajan et al., AxFormer, arXiv 2010.03688",)

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise ValueError(f"tolerance must not be negative, but is {self.tolerance}")
        if unknown := [level for level in self.levels if level not in _LEVELS] or not self.levels:
            raise ValueError(f"levels must be some of {', '.join(_LEVELS)}, but has {unknown}")
        if self.parts < 2:
            raise ValueError(f"parts must be at least 2, but is {self.parts}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Try every element once, each on what the accepted removals have left."""
        refuse_fused(program, self.name)
        require_batches(context.calibration)
        judge = context.score or _agreement(program, context)
        search = _Search(program, judge, self.tolerance)
        for level in self.levels:
            for what, tried in self._tries(search, level, context):
                context.progress(f"removing {what}", search.visited, search.visited + 1)
                search.consider(what, tried)
        if not search.visited:
            raise PassError(
                f"The program {program.name!r} has nothing that {self.name} could remove. Looked for: "
                f"{', '.join(self.levels)}; found none that a linear layer reads or a residual sum adds."
            )
        gate = "the task's score" if context.score else "agreement with the original's answers (no score was given)"
        notes = (
            f"judged by {gate}: {search.start:.4f} before, {search.now:.4f} after",
            f"{len(search.accepted)} of {search.visited} removals kept: {', '.join(search.accepted) or 'none'}",
            f"flops: {1 - used(search.program, 'flops') / used(program, 'flops'):.1%} removed",
        )
        return PassResult(search.program, bool(search.accepted), (), (), notes)

    def _tries(
        self, search: _Search, level: str, context: Context
    ) -> Iterator[tuple[str, Callable[[Program], Program]]]:
        if level == "sublayers":
            for layer in reversed(find_sublayers(search.program)):
                yield layer.path, lambda current, layer=layer: remove_sublayers(current, [layer])  # type: ignore[misc]
            return
        groups = [g for g in find_groups(search.program) if g.kind == level and g.pinned is None and g.consumers]
        if not groups:
            return
        scores, _ = score_units(search.program, groups, "wanda", context)
        for group in reversed(groups):
            count = 1 if level == "heads" else -(-group.units // self.parts)
            parts = scores[group].argsort().split(count)
            gone = torch.zeros(0, dtype=torch.long)
            # the last part would leave nothing: a whole sublayer was tried before
            for number, part in enumerate(parts[:-1]):
                before = len(search.accepted)
                yield f"{group.path} ({level} {number + 1}/{len(parts)})", _without(group, gone, part)
                gone = torch.cat([gone, part]) if len(search.accepted) > before else gone


def _without(group: Group, gone: torch.Tensor, part: torch.Tensor) -> Callable[[Program], Program]:
    """Return what removes the units ``part`` of a group from a program that has already lost ``gone``."""

    def remove(current: Program) -> Program:
        found = next(g for g in find_groups(current) if g.consumers == group.consumers and g.kind == group.kind)
        left = torch.ones(group.units, dtype=torch.bool)
        left[gone] = False
        stays = left.clone()
        stays[part] = False
        return remove_units(current, {found: stays[left]})

    return remove


@dataclass
class _Search:
    """The program as far as it has come, and the best score met."""

    program: Program
    judge: Callable[[Program], float]
    tolerance: float
    accepted: list[str] = field(default_factory=list)
    visited: int = 0

    def __post_init__(self) -> None:
        self.start = self.now = self.best = self.judge(self.program)

    def consider(self, what: str, change: Callable[[Program], Program]) -> None:
        self.visited += 1
        tried = change(self.program)
        score = self.judge(tried)
        if score >= self.best - self.tolerance:
            self.program, self.now, self.best = tried, score, max(self.best, score)
            self.accepted.append(what)


def _agreement(program: Program, context: Context) -> Callable[[Program], float]:
    """Return how far a program's answers agree with those of the original, the mean over batches."""
    batches = context.calibration
    wanted = [answer_of(program, interpret(program, batch), batch) for batch in batches]

    def judge(tried: Program) -> float:
        found = [answer_of(tried, interpret(tried, batch), batch) for batch in batches]
        return sum(one.agreement(other) for one, other in zip(wanted, found, strict=True)) / len(batches)

    return judge
