"""Let layers share their weights in a loop, each with a small difference of its own (Relaxed Recursive Transformer).

    y = W_l x    ->    y = W_s x + B_l (A_l x),    s = l mod layers

The weights of ``layers`` blocks are stored once and run through L / layers times.  ``B_l A_l`` is the truncated
singular value decomposition of ``W_l - W_s``.  The shared weights are those of every (L / layers)-th layer (stepwise),
the mean of all that share (average), or those of the first layers (lower).  Biases and norms stay each layer's own.
Then A and B are trained, block by block, to do what the original does; the paper distils the whole model from labels
and logits instead (Bae et al., arXiv 2410.20672).

It saves bytes, not operations: those are a little more than before.  At full rank the result is the same, and larger.

**Tuned** (approximate with ``iterations=0``): training needs calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.analysis import cost
from xformopt.errors import PassError
from xformopt.match import arguments, operand, xf
from xformopt.passes.depth.support.layers import Layer, layer_linears, require_layers
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, path_of, value_of
from xformopt.reconstruction import Free, Make, Settings, cut_at, reconstruct
from xformopt.rewrite import Editor

__all__ = ["ShareLayers"]

_Linears = Sequence[Sequence[fx.Node]]


@dataclass(frozen=True)
class ShareLayers(Pass):
    """Store the weights of a few layers and loop them, with a low-rank difference for each layer.

    Attributes:
        layers: How many different layers are left; they divide those there are.
        rank: Of each layer's difference; a rank as large as the matrix is exact.
        start: Where the shared weights come from: stepwise, average or lower.
        iterations: Training steps of each layer, at most; 0: the differences stay as decomposed.
        minutes: What training may take in all; none: no limit.

    """

    layers: int = 1
    rank: int = 8
    start: Literal["stepwise", "average", "lower"] = "stepwise"
    iterations: int = 200
    minutes: float | None = 10.0

    effect: ClassVar[Effect] = "tuned"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Bae et al., Relaxed Recursive Transformers, arXiv 2410.20672",)

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, but is {self.layers}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, but is {self.rank}: without a difference, layers are tied")
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, but is {self.iterations}")
        Settings(iterations=max(self.iterations, 1), minutes=self.minutes)

    def run(self, program: Program, context: Context) -> PassResult:
        """Share, decompose, and train the differences."""
        layers = require_layers(program, 2, "to share")
        linears = [layer_linears(program, layer) for layer in layers]
        self._check(program, layers, linears)
        result, differences = self._share(program, linears)
        notes = [self._saved(program, result)]
        if self.iterations and differences:
            notes.append(self._train(program, result, layers, differences, context))
        return PassResult(result, True, (), (), tuple(notes))

    def _check(self, program: Program, layers: Sequence[Layer], linears: _Linears) -> None:
        """Refuse layers that do not divide, or are not alike."""
        if len(layers) % self.layers or self.layers == len(layers):
            fits = [str(count) for count in range(1, len(layers)) if len(layers) % count == 0]
            raise PassError(
                f"The {len(layers)} layers of the program {program.name!r} cannot be a loop of {self.layers}. Set "
                f"layers to {' or '.join(fits)}."
            )
        shapes = [[tuple(value_of(operand(node, 1)).shape) for node in nodes] for nodes in linears]
        for layer, found in zip(layers, shapes, strict=True):
            if not found or found != shapes[0]:
                raise PassError(
                    f"The layers of the program {program.name!r} cannot share weights. Looked for the same linear "
                    f"layers in each, with weights that nothing else reads; found {_listed(shapes[0])} in "
                    f"{layers[0].name}, and {_listed(found)} in {layer.name}."
                )

    def _share(self, program: Program, linears: _Linears) -> tuple[Program, list[str]]:
        """Return the program with shared weights, and the names of the factors of the differences."""
        result = program.copy()
        editor = Editor(result)
        named = {node.name: node for node in result.graph.nodes}
        factors: list[str] = []
        for role in range(len(linears[0])):
            for place in range(self.layers):
                loop = [nodes[role] for nodes in linears[place :: self.layers]]
                weights = [program.parameters[str(operand(node, 1).target)] for node in loop]
                source = self._source(place, len(linears))
                shared = program.parameters[str(operand(linears[source][role], 1).target)]
                if self.start == "average":
                    shared = torch.stack([weight.double() for weight in weights]).mean(0).to(shared.dtype)
                name = f"{operand(loop[0], 1).target}.shared"
                for node, weight in zip(loop, weights, strict=True):
                    factors += self._replace(editor, named[node.name], weight, name, shared)
        return result.drop_unused(), factors

    def _source(self, place: int, count: int) -> int:
        """Return the layer whose weights a place of the loop begins with."""
        return place * (count // self.layers) if self.start == "stepwise" else place

    def _replace(
        self, editor: Editor, node: fx.Node, weight: torch.Tensor, name: str, shared: torch.Tensor
    ) -> list[str]:
        """Compute ``node`` by the shared weight and a difference; return the names of the difference's factors."""
        given, old = arguments(node), str(operand(node, 1).target)
        bias = () if given["bias"] is None else (given["bias"],)
        editor.at(node)
        source = operand(node)
        total = editor.call(xf.linear, source, editor.parameter(name, shared), *bias)
        names: list[str] = []
        if not torch.equal(weight, shared):
            down, up = _decompose(weight.double() - shared.double(), self.rank)
            parts = (("down", down), ("up", up))
            factors = [editor.parameter(f"{old}.{part}", value.to(weight.dtype)) for part, value in parts]
            names = [str(factor.target) for factor in factors]
            difference = editor.call(xf.linear, editor.call(xf.linear, source, factors[0]), factors[1])
            total = editor.call(torch.ops.aten.add.Tensor, total, difference)
        total.meta["path"] = path_of(node)
        node.replace_all_uses_with(total)
        return names

    def _saved(self, before: Program, after: Program) -> str:
        old, new = cost(before), cost(after)
        larger = "" if new.parameter_bytes < old.parameter_bytes else " (no bytes saved: take a smaller rank)"
        return (
            f"parameters: {old.parameter_bytes:,} bytes before, {new.parameter_bytes:,} after{larger}; flops: "
            f"{new.flops / old.flops:.3f} times those before, since a loop runs every layer"
        )

    def _train(
        self, program: Program, result: Program, layers: Sequence[Layer], factors: Sequence[str], context: Context
    ) -> str:
        """Train the factors in place in ``result``; return how it went."""
        makers: dict[str, Make] = {name: partial(Free, result.parameters[name]) for name in factors}
        cuts = [("in front", [layers[0].stream]), *((layer.name, [layer.result]) for layer in layers)]
        found = reconstruct(
            program,
            result,
            context.calibration,
            makers,
            Settings(iterations=self.iterations, minutes=self.minutes, seed=context.seed),
            describes=(self.name, asdict(self)),
            blocks=cut_at(program, cuts),
            progress=context.progress,
        )
        result.parameters.update(found.results)
        return found.summary()


def _decompose(difference: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A ``[rank, I]`` and B ``[O, rank]`` whose product is nearest to a difference ``[O, I]``."""
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes) or "none"
