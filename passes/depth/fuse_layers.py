"""Fold whole layers into their neighbours, which learn to do what they did (FuseGPT).

    W'_t = W_t + (C D) * W_removed + B A

for each linear layer of the neighbours, with the weight of its counterpart in the removed layer; ``*`` is the product
of elements: the low-rank matrix C D says how much of each removed weight is taken over, and B A is an ordinary LoRA.  C
and B begin at zero.  C, D, B and A alone are trained, on the output of the group of neighbours against that of the same
group of the original model, and then folded into one dense weight, which costs no time when it runs (Pei et al., arXiv
2411.14507).  The layer of least Macro Influence goes first; see ``remove-layers``.

**Tuned**: needs calibration data, and minutes.  Biases and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch

from xformopt.analysis import cost
from xformopt.match import operand
from xformopt.passes.depth.support.layers import (
    Layer,
    find_layers,
    hidden_state,
    layer_linears,
    refuse_too_many,
    remove_layers,
)
from xformopt.passes.depth.support.macro_influence import macro_influence, require_calibration
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program
from xformopt.reconstruction import Block, Make, Settings, Variable, cut_at, reconstruct

__all__ = ["FuseLayers", "FusedWeight"]


@dataclass(frozen=True)
class FuseLayers(Pass):
    """Remove layers by their Macro Influence, and fold their weights into their neighbours.

    Attributes:
        layers: How many to remove.
        group: Layers of a group, the removed one among them.
        rank: Of the coefficients C D, and of the LoRA B A.
        iterations: Training steps for each removed layer, at most.
        minutes: What training may take in all; none: no limit.

    """

    layers: int = 1
    group: int = 7
    rank: int = 8
    iterations: int = 400
    minutes: float | None = 10.0

    effect: ClassVar[Effect] = "tuned"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Pei et al., FuseGPT, arXiv 2411.14507",)

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, but is {self.layers}")
        if self.group < 2:
            raise ValueError(f"group must be at least 2, the removed layer and a neighbour, but is {self.group}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but is {self.rank}")
        self._settings(0)

    def run(self, program: Program, context: Context) -> PassResult:
        """Remove one layer after the other, and train its neighbours each time."""
        require_calibration(context.calibration)
        refuse_too_many(self.name, program, self.layers)
        result, notes = program, []
        for done in range(self.layers):
            context.progress("fusing layers", done, self.layers)
            layers = find_layers(result)
            influence = macro_influence(result, layers, context.calibration)
            removed = min(influence, key=influence.__getitem__)
            result, note = self._fuse(program, result, layers, removed, context)
            notes.append(f"fused: {removed.name} (Macro Influence {influence[removed]:.3g}); {note}")
        before, after = cost(program), cost(result)
        notes.append(f"flops: {1 - after.flops / before.flops:.1%} removed")
        notes.append(f"parameters: {1 - after.parameters / before.parameters:.1%} removed")
        return PassResult(result, True, (), (), tuple(notes))

    def _fuse(
        self, original: Program, program: Program, layers: Sequence[Layer], removed: Layer, context: Context
    ) -> tuple[Program, str]:
        members = _group_around(layers, removed, self.group)
        smaller = remove_layers(program, [removed])
        found = reconstruct(
            original,
            smaller,
            context.calibration,
            self._variables(program, members, removed, context.seed),
            self._settings(context.seed),
            describes=(self.name, asdict(self), removed.name),
            blocks=_cuts(original, program, members, removed),
            progress=context.progress,
        )
        # the weights that were trained take the places of the old ones, in this copy alone
        smaller.parameters.update(found.results)
        return smaller, found.summary()

    def _variables(self, program: Program, members: Sequence[Layer], removed: Layer, seed: int) -> Mapping[str, Make]:
        """Return what makes the variable of each weight whose counterpart in the removed layer has its shape."""
        old = [program.parameters[str(operand(linear, 1).target)] for linear in layer_linears(program, removed)]
        made: dict[str, Make] = {}
        for layer in members:
            names = [str(operand(linear, 1).target) for linear in layer_linears(program, layer)]
            if layer is removed or [program.parameters[name].shape for name in names] != [w.shape for w in old]:
                continue
            for name, weight in zip(names, old, strict=True):
                made[name] = partial(FusedWeight, program.parameters[name], weight, self.rank, seed + len(made))
        return made

    def _settings(self, seed: int) -> Settings:
        minutes = None if self.minutes is None else self.minutes / self.layers
        return Settings(iterations=self.iterations, minutes=minutes, seed=seed)


class FusedWeight(Variable):
    """A weight ``[O, I]`` that takes over part of a removed one: ``W + (C D) * removed + B A``.

    C and B are ``[O, rank]`` and begin at zero, D and A are ``[rank, I]`` and begin at random.
    """

    def __init__(self, start: torch.Tensor, removed: torch.Tensor, rank: int, seed: int, *, rate: float = 2e-3) -> None:
        super().__init__(start, rate)
        self.removed = removed
        (rows, columns), self.rank = start.shape, min(rank, *start.shape)
        generator = torch.Generator().manual_seed(seed)
        right = torch.randn(2 * self.rank, columns, generator=generator) / self.rank**0.5
        left = torch.zeros(rows, 2 * self.rank)
        self.leaf = torch.cat([left.flatten(), right.flatten()]).to(start.dtype).requires_grad_()

    def value(self) -> torch.Tensor:
        """Return the value to compute with in training."""
        rows, columns, rank = *self.start.shape, self.rank
        left = self.leaf[: 2 * rows * rank].view(rows, 2 * rank)
        right = self.leaf[2 * rows * rank :].view(2 * rank, columns)
        taken_over = left[:, :rank] @ right[:rank] * self.removed
        # A in the scale of the weights, so that both parts train alike
        return self.start + taken_over + left[:, rank:] @ right[rank:] * self.start.std()


def _group_around(layers: Sequence[Layer], removed: Layer, size: int) -> Sequence[Layer]:
    """Return the ``size`` layers in whose middle the removed one stands, fewer at the ends of the model."""
    first = max(min(layers.index(removed) - (size - 1) // 2, len(layers) - size), 0)
    return layers[first : first + size]


def _cuts(original: Program, program: Program, members: Sequence[Layer], removed: Layer) -> tuple[Block, ...]:
    """Cut the original in front of the group and behind it.

    A group that ends with the removed layer, the last one, is judged at the norm behind it, or by what is returned.
    """
    cuts = [("in front", [members[0].stream])]
    end = members[-1].result
    if members[-1] is removed:
        end = hidden_state(program, members)
    if end != removed.result:
        cuts.append(("group", [end]))
    return cut_at(original, cuts)
