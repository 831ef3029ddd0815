"""Put consecutive layers side by side, so that a model is as wide as before and less deep (ParallelViT).

    x' = x + a_1(x)                          x'   = x + a_1(x) + a_2(x)
    x'' = x' + m_1(x')              ->       x''  = x' + m_1(x') + m_2(x')
    (and the same with a_2, m_2)

The pairs of neighbours go first whose exchange turns the last hidden state least, ``1 - mean cos``; all are tried again
after each.  What then stands side by side is merged into single operators where it can be, exactly, by
``merge-branches``.

The operations stay the same, and so do the bytes: only their number and width change.  There is something to gain where
a layer alone does not fill the machine, at batch 1 and small widths; the notes tell the measured speed-up, or why there
is none.  Touvron et al. train the parallel form from nothing; a trained model loses accuracy by the exchange, which
training can win back.

**Approximate**, without training; needs calibration data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.passes.depth.merge_branches import MergeBranches
from xformopt.passes.depth.support.layers import Layer, hidden_state, require_layers
from xformopt.passes.depth.support.macro_influence import require_calibration, state_distance
from xformopt.passes.sublayers import Sublayer, find_sublayers
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor

__all__ = ["ParallelizeLayers"]

# what each exchange is judged on: it takes a run for every pair that is left
_BATCHES = 2
_Pair = tuple[Layer, Layer]


@dataclass(frozen=True)
class ParallelizeLayers(Pass):
    """Put pairs of consecutive layers side by side.

    Attributes:
        pairs: How many; 0: as many as there are.
        merge: Whether branches side by side become single operators.

    """

    pairs: int = 0
    merge: bool = True

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Touvron et al., Three things everyone should know about Vision Transformers, arXiv 2203.09795",
    )

    def __post_init__(self) -> None:
        if self.pairs < 0:
            raise ValueError(f"pairs must be at least 0, but is {self.pairs}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose pairs one after the other, then merge and measure."""
        require_calibration(context.calibration)
        layers = require_layers(program, 2, "to put side by side")
        sublayers = _sublayers_of(program, layers)
        pairs = [pair for pair in pairwise(layers) if _are_alike(pair, sublayers)]
        most = _most_disjoint(pairs)
        if not most or self.pairs > most:
            raise PassError(
                f"The budget cannot be met: {self.pairs or 'some'} pairs of layers are to stand side by side. Looked "
                f"for consecutive layers with the same kinds of residual branches and nothing between them; of the "
                f"{len(layers)} layers of the program {program.name!r}, at best, {most} pairs do."
            )
        chosen = self._choose(program, layers, pairs, self.pairs or most, context)
        result, _ = _side_by_side(program, layers, [pair for pair, _ in chosen])
        notes = [f"side by side: {one.name} and {two.name} (turn {turn:.3g})" for (one, two), turn in chosen]
        if self.merge:
            merged = MergeBranches().run(result, context)
            result = merged.program
            notes.append(f"{len(merged.fired)} sums of branches merged")
            notes.extend(sorted({f"not merged: {refused.reason}" for refused in merged.rejected}))
        return PassResult(result, True, (), (), (*notes, _gain(program, result, context)))

    def _choose(
        self, program: Program, layers: Sequence[Layer], pairs: Sequence[_Pair], wanted: int, context: Context
    ) -> list[tuple[_Pair, float]]:
        """Return disjoint pairs with how far each turned the last hidden state, beside those before."""
        left = list(pairs)
        chosen: list[tuple[_Pair, float]] = []
        while len(chosen) < wanted:
            context.progress("trying pairs of layers", len(chosen), wanted)
            before = [pair for pair, _ in chosen]
            # one that leaves too few for the rest is not tried
            allowed = [p for p in left if 1 + _most_disjoint(_apart_from(left, p)) >= wanted - len(chosen)]
            turns = {pair: _turn(program, layers, [*before, pair], context) for pair in allowed}
            best = min(turns, key=turns.__getitem__)
            chosen.append((best, turns[best]))
            left = _apart_from(left, best)
        return sorted(chosen, key=lambda entry: layers.index(entry[0][0]))


def _apart_from(pairs: Sequence[_Pair], chosen: _Pair) -> list[_Pair]:
    return [pair for pair in pairs if not set(pair) & set(chosen)]


def _most_disjoint(pairs: Sequence[_Pair]) -> int:
    """Return how many of some pairs of neighbours, in their order, can be chosen at once."""
    count, last = 0, None
    for one, two in pairs:
        if one != last:
            count, last = count + 1, two
    return count


def _turn(program: Program, layers: Sequence[Layer], pairs: Sequence[_Pair], context: Context) -> float:
    changed, hidden = _side_by_side(program, layers, pairs)
    return state_distance(program, changed, (hidden_state(program, layers), hidden), context.calibration[:_BATCHES])


def _sublayers_of(program: Program, layers: Sequence[Layer]) -> Mapping[Layer, list[Sublayer]]:
    """Return the residual branches of each layer, in execution order."""
    found = find_sublayers(program)
    return {layer: [branch for branch in found if branch.total in layer.nodes] for layer in layers}


def _are_alike(pair: _Pair, sublayers: Mapping[Layer, list[Sublayer]]) -> bool:
    one, two = (sublayers[layer] for layer in pair)
    chain = [*one, *two]
    follow = all(later.stream == earlier.total for earlier, later in pairwise(chain))
    kinds = [[branch.is_attention for branch in branches] for branches in (one, two)]
    return bool(one) and kinds[0] == kinds[1] and follow and chain[0].stream == pair[0].stream


def _side_by_side(program: Program, layers: Sequence[Layer], pairs: Sequence[_Pair]) -> tuple[Program, str]:
    """Return the program with the pairs side by side, and the name of its last hidden state."""
    hidden = hidden_state(program, layers)
    result = program.copy()
    # what stands for each value of the original program
    now = {node.name: node for node in result.graph.nodes}
    editor, sublayers = Editor(result), _sublayers_of(program, layers)
    for pair in pairs:
        end = now[pair[1].result]
        total = now[pair[0].stream]
        for side in zip(*(sublayers[layer] for layer in pair), strict=True):
            reads = total
            for branch in side:
                copied = _copy_branch(editor.at(end), program, branch, {**now, branch.stream: reads})
                total = editor.call(torch.ops.aten.add.Tensor, total, copied)
        end.replace_all_uses_with(total)
        now[end.name] = total
    return result.drop_unused(), now[hidden].name


def _copy_branch(editor: Editor, program: Program, branch: Sublayer, now: Mapping[str, fx.Node]) -> fx.Node:
    """Compute a branch of ``program`` once more, from the values that ``now`` has for its inputs."""
    copied: dict[str, fx.Node] = {}

    def read(node: fx.Node) -> fx.Node:
        return copied.get(node.name) or now[node.name]

    for node in _inside(program, branch):
        copied[node.name] = editor.call(
            node.target, *fx.map_arg(node.args, read), name=node.name, **fx.map_arg(dict(node.kwargs), read)
        )
        copied[node.name].meta["path"] = path_of(node)
    return copied[branch.branch]


def _inside(program: Program, branch: Sublayer) -> list[fx.Node]:
    """Return the operators on the ways from a branch's stream to its end, in execution order."""
    reached: set[str] = {branch.stream}
    ahead: set[str] = {branch.branch}
    nodes = list(program.nodes())
    for node in nodes:
        if any(value.name in reached for value in node.all_input_nodes):
            reached.add(node.name)
    for node in reversed(nodes):
        if any(user.name in ahead for user in node.users):
            ahead.add(node.name)
    return [node for node in nodes if node.name in reached & ahead and node.name != branch.stream]


def _gain(before: Program, after: Program, context: Context) -> str:
    """Say what was measured, or why nothing can be said."""
    if context.measure is None:
        return "speed-up: not measured in this run, which times nothing"
    low, high = context.measure(before, after)
    if low <= 1 <= high:
        return (
            f"speed-up: no difference (measured {low:.2f} to {high:.2f}): the operations are the same, and one layer "
            f"alone keeps the machine busy"
        )
    return f"speed-up: {(low + high) / 2:.2f} (measured {low:.2f} to {high:.2f})"
