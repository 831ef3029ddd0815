"""Remove attention heads, FFN units and residual channels, in one shot, until a budget is met.

    y = sum over units u of W_out[:, u] f(W_in[u] x)    ->    the same sum over the units that stay

The shapes of all coupled weights shrink; ``heads`` follows.  What stays is what a criterion finds important
(``importance.py``, ``optin.py``), chosen under the budget (``unit_selection.py``); the layers that read it are refitted
by least squares (``least_squares.py``).  **Approximate**, without training.

Heads and FFN units that go are as if they answered zero.  A residual channel that goes is no longer part of what the
norms take their statistics of, either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from xformopt.analysis.coupling import Group, find_groups
from xformopt.errors import PassError
from xformopt.passes.budgets import Budget, used
from xformopt.passes.least_squares import refit
from xformopt.passes.prune.support.importance import Importance, Scores
from xformopt.passes.prune.support.removal import refuse_fused, remove_units
from xformopt.passes.prune.support.unit_scores import score_units
from xformopt.passes.prune.support.unit_selection import Allocation, Selection, meet_budget, unit_costs
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, shape_of
from xformopt.rewrite import Rejected

__all__ = ["PruneUnits"]


@dataclass(frozen=True)
class PruneUnits(Pass):
    """Remove attention heads, FFN units or residual channels until a budget is met.

    Attributes:
        remove: The share of the budgeted quantity to remove, between 0 and 1.
        budget: What is budgeted: flops, at the example shape; parameters; latency, measured on the target.
        importance: What the units are worth: optin, taylor, wanda or magnitude.
        targets: What may go: heads, hidden (FFN units), width (channels of the residual stream; not with optin).
        multiple: Of channels that are left where units are removed: 1, 8, 16 or 32.
        allocation: global: all layers compete; layerwise: every layer loses the same share.
        reconstruct: Refit the layers that read what is left, by least squares on calibration data.
        together: How many FFN units of a layer share a forward pass, and its score, with optin.

    """

    remove: float = 0.4
    budget: Budget = "flops"
    importance: Importance = "optin"
    targets: tuple[Literal["heads", "hidden", "width"], ...] = ("heads", "hidden")
    multiple: int = 8
    allocation: Allocation = "global"
    reconstruct: bool = True
    together: int = 1

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Khaki and Plataniotis, OPTIN, arXiv 2403.17921",
        "Sun et al., Wanda, arXiv 2306.11695",
        "Molchanov et al., arXiv 1611.06440 (first-order Taylor)",
        "Kwon et al., arXiv 2204.09656 (least-squares reconstruction)",
    )

    def __post_init__(self) -> None:
        if not 0 < self.remove < 1:
            raise ValueError(f"remove must lie between 0 and 1, but is {self.remove}")
        if self.multiple not in (1, 8, 16, 32):
            raise ValueError(f"multiple must be 1, 8, 16 or 32, but is {self.multiple}")
        if not self.targets:
            raise ValueError("targets must name heads, hidden or width, or several of them")
        if "width" in self.targets and self.importance == "optin":
            raise ValueError("optin masks heads and FFN units; for width, choose importance=taylor, wanda or magnitude")
        if self.together < 1:
            raise ValueError(f"together must be at least 1, but is {self.together}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Score the units, choose those that go, remove them and refit what reads the rest."""
        refuse_fused(program, self.name)
        groups, rejected = self._candidates(program)
        scores, silent = self._scores(program, groups, context)
        rejected += silent
        # time is measured, and what is removed for it is counted in FLOPs
        counted = "flops" if self.budget == "latency" else self.budget
        costs = unit_costs(program, groups, counted)
        selection = Selection.of(scores, costs, self.multiple, self.allocation)
        kept = meet_budget(program, selection, self.remove, self.budget, context)
        result = remove_units(program, kept)
        if self.reconstruct:
            result = refit(program, result, _readers(program, result, kept), context.calibration, context.progress)
        notes = (*self._notes(program, result, groups, kept), *_lone_survivors(groups, kept))
        return PassResult(result, True, (), tuple(rejected), notes)

    def _candidates(self, program: Program) -> tuple[list[Group], list[Rejected]]:
        every = find_groups(program)
        found = [group for group in every if group.kind in self.targets and group.consumers]
        refused = {group: group.pinned for group in found if group.pinned is not None}
        refused |= {group: f"it has a single unit ({group.kind})" for group in found if group.units == 1}
        groups = [group for group in found if group not in refused]
        rejected = [self._reject(group, str(reason)) for group, reason in refused.items()]
        if not groups:
            kinds = sorted({group.kind for group in every})
            reasons = "; ".join(sorted({rejection.reason for rejection in rejected})) or "none"
            raise PassError(
                f"The program {program.name!r} has nothing that {self.name} could remove. Looked for: "
                f"{' and '.join(_LOOKED_FOR[target] for target in self.targets)}. Found: coupled channels of the kinds "
                f"{', '.join(kinds) or 'none'}; candidates refused: {reasons}."
            )
        return groups, rejected

    def _reject(self, group: Group, reason: str) -> Rejected:
        return Rejected(self.name, group.path, group.consumers[0], reason)

    def _scores(self, program: Program, groups: list[Group], context: Context) -> tuple[Scores, list[Rejected]]:
        """Return importances; units that the data never excites are worth everything."""
        scores, silent = score_units(program, groups, self.importance, context, together=self.together)
        rejected = []
        for group, unknown in silent.items():
            scores[group] = torch.where(unknown, torch.inf, scores[group])
            rejected.append(
                self._reject(
                    group,
                    f"the calibration data never excites {int(unknown.sum())} of its {group.units} units, so that "
                    f"their importance is not known: they stay",
                )
            )
        return scores, rejected

    def _notes(
        self, before: Program, after: Program, groups: Sequence[Group], kept: Mapping[Group, torch.Tensor]
    ) -> tuple[str, ...]:
        notes = []
        for kind in dict.fromkeys(group.kind for group in groups):
            units = sum(group.units for group in groups if group.kind == kind)
            gone = sum(int((~stays).sum()) for group, stays in kept.items() if group.kind == kind)
            notes.append(f"{kind}: {units - gone} of {units} stay")
        for budget in ("flops", "parameters"):
            notes.append(f"{budget}: {1 - used(after, budget) / used(before, budget):.1%} removed")
        return tuple(notes)


def _readers(before: Program, after: Program, kept: Mapping[Group, torch.Tensor]) -> list[str]:
    """Return the linear layers that lost inputs and no outputs, in execution order."""
    reading = {name for group in kept for name in group.consumers}
    whole = {node.name: shape_of(before, node) for node in before.nodes() if node.name in reading}
    return [node.name for node in after.nodes() if node.name in whole and shape_of(after, node) == whole[node.name]]


def _lone_survivors(groups: Sequence[Group], kept: Mapping[Group, torch.Tensor]) -> tuple[str, ...]:
    """Say which layers would have lost every head: the best one stays, a whole sublayer is another pass's to remove."""
    alone = [group for group in groups if group.kind == "heads" and group in kept and int(kept[group].sum()) == 1]
    if not alone:
        return ()
    return (f"a single head stays in {', '.join(group.path for group in alone)}: a layer keeps its best",)


_LOOKED_FOR = {
    "heads": "heads of xf.attention whose output a linear layer reads",
    "hidden": "units between linear layers with an activation or a gate",
    "width": "channels that residual sums share",
}
