"""Take a smaller model out of one that was trained with nested FFNs (MatFormer's Mix'n'Match).

    W_in, W_out    ->    W_in[:m], W_out[:, :m]        the first m of an FFN's units, m by layer

The widths follow the grid that the model was trained on.  Along the depth they never fall, and two neighbouring steps
of the grid are used at most; of the models so described, the largest within the budget is taken.

**Approximate** for a model trained so, and arbitrary for any other: its first units are no better than others, and
taking them is unit pruning with a bad criterion.  That is tested: on calibration data the first half of all units must
answer at least twice as near to the whole model as any of three random halves, or the pass refuses.

Devvrit et al., "MatFormer: Nested Transformer for Elastic Inference", arXiv 2310.07707.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from xformopt.analysis.coupling import Group, find_groups
from xformopt.errors import PassError
from xformopt.passes.answers import answer_of
from xformopt.passes.budgets import used
from xformopt.passes.prune.support.importance import require_batches
from xformopt.passes.prune.support.removal import refuse_fused, remove_units
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, interpret

__all__ = ["ExtractPrefixes"]

_CONTROLS = 3
# how much nearer a prefix must be than the best of the controls
_MARGIN = 2.0


@dataclass(frozen=True)
class ExtractPrefixes(Pass):
    """Take the first units of every FFN of a model that was trained with nested FFNs.

    Attributes:
        remove: The share of the budgeted quantity to remove, between 0 and 1.
        budget: What is budgeted: flops, at the example shape; or parameters.
        grid: The shares of the FFN width that the model was trained at, ascending, the last of them 1.

    """

    remove: float = 0.2
    budget: Literal["flops", "parameters"] = "flops"
    grid: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Devvrit et al., MatFormer, arXiv 2310.07707",)

    def __post_init__(self) -> None:
        if not 0 < self.remove < 1:
            raise ValueError(f"remove must lie between 0 and 1, but is {self.remove}")
        if len(self.grid) < 2 or list(self.grid) != sorted(set(self.grid)) or self.grid[0] <= 0 or self.grid[-1] != 1:
            raise ValueError(f"grid must ascend from above 0 to 1, but is {self.grid}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Check that the units are nested, then take the largest model within the budget."""
        refuse_fused(program, self.name)
        require_batches(context.calibration)
        groups = [g for g in find_groups(program, "hidden") if g.pinned is None and g.consumers]
        if not groups:
            raise PassError(
                f"The program {program.name!r} has no FFN whose first units could be taken. Looked for units between "
                f"linear layers with an activation or a gate."
            )
        _check_nested(program, groups, context)
        limit = (1 - self.remove) * used(program, self.budget)
        best: tuple[int, Program, list[float]] | None = None
        smallest = used(program, self.budget)
        for shares in self._mixtures(len(groups)):
            tried = remove_units(program, _prefixes(groups, shares))
            size = used(tried, self.budget)
            smallest = min(smallest, size)
            if size <= limit and (best is None or size > best[0]):
                best = (size, tried, shares)
        if best is None:
            whole = used(program, self.budget)
            raise PassError(
                f"The budget cannot be met: {self.remove:.0%} of the {self.budget} are to go, and at the narrowest "
                f"width of the grid in every layer {1 - smallest / whole:.1%} do. Ask for less."
            )
        widths = ", ".join(f"{group.path} {share:g}" for group, share in zip(groups, best[2], strict=True))
        notes = (f"shares of the FFN width: {widths}",)
        return PassResult(best[1], True, (), (), notes)

    def _mixtures(self, layers: int) -> Iterator[list[float]]:
        """Yield shares by layer: some layers at one step of the grid, the layers behind them at the next."""
        for narrow, wide in zip(self.grid, self.grid[1:], strict=False):
            for count in range(1, layers + 1):
                yield [narrow] * count + [wide] * (layers - count)


def _prefixes(groups: Sequence[Group], shares: Sequence[float]) -> dict[Group, torch.Tensor]:
    return {
        group: torch.arange(group.units) < max(1, round(share * group.units))
        for group, share in zip(groups, shares, strict=True)
    }


def _check_nested(program: Program, groups: Sequence[Group], context: Context) -> None:
    batch = context.calibration[0]
    wanted = answer_of(program, interpret(program, batch), batch)

    def divergence(kept: dict[Group, torch.Tensor]) -> float:
        smaller = remove_units(program, kept)
        return float(wanted.divergence(answer_of(smaller, interpret(smaller, batch), batch)))

    generator = torch.Generator().manual_seed(context.seed)
    halves = _prefixes(groups, [0.5] * len(groups))
    prefix = divergence(halves)
    controls = [
        divergence({group: half[torch.randperm(group.units, generator=generator)] for group, half in halves.items()})
        for _ in range(_CONTROLS)
    ]
    if prefix * _MARGIN > min(controls):
        raise PassError(
            f"The FFNs of {program.name!r} are not nested: with the first half of their units the answer diverges by "
            f"{prefix:.2e}, with a random half by {min(controls):.2e}, where a model trained with nested FFNs is at "
            f"least {_MARGIN:g} times nearer with its first units. On this model a prefix is unit pruning with an "
            f"arbitrary criterion: use prune-units."
        )
