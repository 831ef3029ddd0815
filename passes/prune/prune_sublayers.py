"""Remove whole attention or FFN sublayers until a budget is met.

    s = x + f(x)    ->    s = x

Greedy: of all sublayers that are left, the one goes whose removal moves the answer of the original model least for what
it saves, measured by running the model without it on calibration data; then all are measured again (the order of Pei
et al., arXiv 2411.14507, on sublayers instead of blocks).  The move of an answer p is KL(p || p'); see ``answers.py``.
The next sublayer behind each gap is refitted by least squares to fill it (``least_squares.py``).
**Approximate**, without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar, Literal

import torch

from xformopt.errors import PassError
from xformopt.match import is_call, xf
from xformopt.passes.answers import answer_of
from xformopt.passes.budgets import Budget, used
from xformopt.passes.least_squares import refit
from xformopt.passes.prune.support.importance import require_batches
from xformopt.passes.replay import Replay
from xformopt.passes.sublayers import Sublayer, find_sublayers, remove_sublayers, stream_of
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, interpret

__all__ = ["PruneSublayers"]

# what each removal is judged on: it takes a run for every sublayer that is left
_BATCHES = 2


@dataclass(frozen=True)
class PruneSublayers(Pass):
    """Remove whole attention or FFN sublayers until a budget is met.

    Attributes:
        remove: The share of the budgeted quantity to remove, between 0 and 1.
        budget: What is budgeted: flops, at the example shape; parameters; latency, measured on the target.
        targets: Which sublayers may go: attention, other, or both.
        reconstruct: Refit the next sublayer behind each gap, by least squares on calibration data.

    """

    remove: float = 0.2
    budget: Budget = "flops"
    targets: tuple[Literal["attention", "other"], ...] = ("attention", "other")
    reconstruct: bool = True

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Pei et al., FuseGPT, arXiv 2411.14507 (greedy order)",)

    def __post_init__(self) -> None:
        if not 0 < self.remove < 1:
            raise ValueError(f"remove must lie between 0 and 1, but is {self.remove}")
        if not self.targets:
            raise ValueError("targets must name attention, other, or both")

    def run(self, program: Program, context: Context) -> PassResult:
        """Remove one sublayer after the other, then refit behind the gaps."""
        require_batches(context.calibration)
        every = find_sublayers(program)
        left = [layer for layer in every if ("attention" if layer.is_attention else "other") in self.targets]
        if not left:
            raise PassError(
                f"The program {program.name!r} has no sublayer that {self.name} could remove. Looked for sums x + f(x) "
                f"of a value and what is computed from it ({', '.join(self.targets)}); found {len(every)} sublayers in "
                f"all, none of them of that kind."
            )
        gone: list[Sublayer] = []
        result, reached = program, 0.0
        whole = used(program, "flops")
        saved = {layer: max(1, whole - used(remove_sublayers(program, [layer]), "flops")) for layer in left}
        while reached < self.remove:
            if not left:
                raise PassError(
                    f"The budget cannot be met: {self.remove:.0%} of the {self.budget} are to go, and without any of "
                    f"the {len(gone)} sublayers {reached:.1%} do. Ask for less, or prune units as well."
                )
            context.progress("removing sublayers", len(gone), len(gone) + len(left))
            harm = _harm(program, result, left, context.calibration[:_BATCHES])
            _, least = min(((harm[layer] / saved[layer], layer) for layer in left), key=itemgetter(0))
            left.remove(least)
            gone.append(least)
            result = remove_sublayers(program, gone)
            reached = self._reached(program, result, context)
        if self.reconstruct:
            result = refit(program, result, _behind(result, every, gone), context.calibration, context.progress)
        notes = (
            f"removed: {', '.join(layer.path for layer in gone)}",
            f"flops: {1 - used(result, 'flops') / used(program, 'flops'):.1%} removed",
        )
        return PassResult(result, True, (), (), notes)

    def _reached(self, before: Program, after: Program, context: Context) -> float:
        """Return the share of the budget that is gone; of latency, by the middle of the measured interval."""
        if self.budget != "latency":
            return 1 - used(after, self.budget) / used(before, self.budget)
        if context.measure is None:
            raise PassError(
                "A latency budget is met by measuring on the target, and this run times nothing. Leave --no-bench away "
                "(or give measure=... in Python), or set budget=flops."
            )
        return 1 - 2 / sum(context.measure(before, after))


def _harm(
    program: Program, current: Program, layers: Sequence[Sublayer], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[Sublayer, float]:
    """Return how far the answers of the original move when one layer more is left out."""
    named = {node.name: node for node in current.graph.nodes}
    found = dict.fromkeys(layers, 0.0)
    for batch in batches:
        wanted = answer_of(program, interpret(program, batch), batch)
        replay = Replay(current, batch)
        for layer in layers:
            total = named[layer.total]
            stream = stream_of(total, named[layer.branch])
            values = replay.run(total, replay.values[stream], 1, current.results)
            outputs = {spec.name: values[node] for spec, node in zip(current.outputs, current.results, strict=True)}
            found[layer] += float(wanted.divergence(answer_of(current, outputs, batch)))
    return found


def _behind(result: Program, every: Sequence[Sublayer], gone: Sequence[Sublayer]) -> list[str]:
    """Return the linear layers that write the next branch behind each gap."""
    named = {node.name: node for node in result.graph.nodes}
    found: list[str] = []
    for position, layer in enumerate(every):
        if layer not in gone:
            continue
        following = next((later for later in every[position + 1 :] if later not in gone), None)
        if following is not None and is_call(named[following.branch], xf.linear) and following.branch not in found:
            found.append(following.branch)
    return found
