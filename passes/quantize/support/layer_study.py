"""Measuring what each linear layer may become: drift of the program's outputs, bytes saved, time on the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.errors import PassError
from xformopt.match import arguments, operand
from xformopt.passes.quantize.support.quantized_layers import (
    QuantizeLinears,
    Replace,
    drift_between,
    measured_batches,
    quantize_layers,
)
from xformopt.passes.weights import LinearParts, linear_layers
from xformopt.pipeline import Context, PassResult
from xformopt.program import Program, interpret, path_of, value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["FLOAT", "LayerStudy", "Option", "Unit"]

FLOAT = "float"


@dataclass(frozen=True)
class Option:
    """One way to keep a weight, and what was measured of it; ``milliseconds`` is 0 where time was not asked for."""

    name: str
    saved_bytes: int = 0
    milliseconds: float = 0.0
    drift: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Layers that share a weight, and so get the same bits; the first option is to stay in float."""

    layers: tuple[fx.Node, ...]
    options: tuple[Option, ...]
    refused: tuple[str, ...]

    @property
    def path(self) -> str:
        """Where the first of the layers comes from."""
        return path_of(self.layers[0]) or self.layers[0].name

    @property
    def measured(self) -> str:
        """What was found of the candidates, in words."""
        return ", ".join([*(f"{option.name} drifts {option.drift:.1e}" for option in self.options[1:]), *self.refused])


class LayerStudy:
    """Quantizes layers by candidates and measures what that does.

    Attributes:
        program: The program, whose own outputs drift is measured from.
        units: What may be quantized.

    """

    def __init__(
        self,
        program: Program,
        context: Context,
        layers: Sequence[fx.Node],
        candidates: Mapping[str, QuantizeLinears],
        *,
        skip: Sequence[str],
        is_timed: bool,
    ) -> None:
        self.program, self._context, self._layers, self._skip = program, context, layers, skip
        self._candidates = candidates
        self._batches = measured_batches(program, context)
        self._rows: dict[str, int] = {}
        self._wanted = [interpret(program, batch, observe=self._see_rows) for batch in self._batches]
        self._replacing: dict[str, Replace] = {
            name: kind.replacing(program, context, layers) for name, kind in candidates.items()
        }
        self._times = self._measured_times() if is_timed else {}
        self.units = self._measured_units()

    def drift(self, changed: Program) -> float:
        """Return the drift of a changed program's outputs."""
        return drift_between(self.program, self._batches, self._wanted, changed)

    def quantize(self, chosen: Mapping[str, str], reasons: Mapping[str, str]) -> PassResult:
        """Quantize the layers in ``chosen``, each by its candidate; ``reasons`` say why others stay as they are."""

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            return self._replacing[chosen[parts.node.name]](editor, parts, source)

        kept = {node.name: "it is not asked for" for node in linear_layers(self.program) if node.name not in chosen}
        return quantize_layers(self.program, replace_layer, self._skip, kept | dict(reasons))

    def _see_rows(self, node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.dim():
            self._rows[node.name] = value.numel() // max(value.shape[-1], 1)

    def _measured_units(self) -> tuple[Unit, ...]:
        by_weight: dict[str, list[fx.Node]] = {}
        for node in self._layers:
            by_weight.setdefault(str(operand(node, 1).target), []).append(node)
        units = []
        for index, nodes in enumerate(by_weight.values()):
            self._context.progress("measuring the sensitivity of layers", index, len(by_weight))
            units.append(self._measured_unit(nodes))
        return tuple(units)

    def _measured_unit(self, nodes: Sequence[fx.Node]) -> Unit:
        options = [Option(FLOAT, milliseconds=self._milliseconds(nodes, FLOAT))]
        refused = []
        for name in self._candidates:
            result = self.quantize({node.name: name for node in nodes}, {})
            if not result.changed:
                found = [refusal.reason for refusal in result.rejected if refusal.value == nodes[0].name]
                refused.append(f"{name} is refused: {found[0]}")
                continue
            saved = self.program.parameter_bytes - result.program.parameter_bytes
            options.append(Option(name, saved, self._milliseconds(nodes, name), self.drift(result.program)))
        return Unit(tuple(nodes), tuple(options), tuple(refused))

    def _milliseconds(self, nodes: Sequence[fx.Node], name: str) -> float:
        return sum(self._times.get((self._text(node), name), 0.0) for node in nodes)

    def _measured_times(self) -> dict[tuple[str, str], float]:
        """Return the milliseconds of each distinct layer as each candidate, alone and at the size of the data."""
        if self._context.time is None:
            raise PassError(
                "Times of layers are measured on the target, and whoever runs the pass gave no clock. Run it by "
                "xformopt optimize, call Pipeline.run with time=..., or limit size or drift instead."
            )
        programs: dict[tuple[str, str], Program] = {}
        for text in dict.fromkeys(map(self._text, self._layers)):
            alone = Program.parse(text)
            programs[text, FLOAT] = alone
            for name, kind in self._candidates.items():
                replace_layer = kind.replacing(alone, Context(), linear_layers(alone))
                result = quantize_layers(alone, replace_layer, (), {})
                if result.changed:
                    programs[text, name] = result.program
        taken = self._context.time({str(number): program for number, program in enumerate(programs.values())})
        return {key: taken[str(number)] for number, key in enumerate(programs)}

    def _text(self, node: fx.Node) -> str:
        """Return a program of the layer alone; layers of one size have one text."""
        rows, (outputs, inputs) = self._rows[operand(node).name], value_of(operand(node, 1)).shape
        given = arguments(node)
        bias = f"param %b: f32[{outputs}]\n" if given["bias"] is not None else ""
        operands = "%x, %w, %b" if bias else "%x, %w"
        return (
            f'program "layer" lifted\ninput %x: f32[{rows},{inputs}]\nparam %w: f32[{outputs},{inputs}]\n{bias}'
            f"%y: f32[{rows},{outputs}] = xf.linear({operands})\nreturn y=%y\n"
        )
