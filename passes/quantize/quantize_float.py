"""Store the weights of linear layers in floating point of 4, 6 or 8 bits and multiply in the precision of the input.

    y = x W^T + b    ->    y = x W^^T + b,    W^ = values[codes] * scale, one scale per group of input channels

Rounded to the nearest value; or up or down as suits the output of the block, trained like adaround's, with the two
neighbours taken from the table of the format, whose steps double at powers of two.  Activations can be rounded to a
format of their own, with a scale for each token at run time.

**Approximate**; training takes gradient steps on calibration data.  Run it after the passes that look for linear
layers.  Weights are stored in few bits; ONNX Runtime makes floats of them when it loads the model, and multiplies
floats.  Rounded activations are simulated in float; only where both are E4M3, ``triton-cuda`` multiplies 8-bit floats
on a GPU that can (compute capability 8.9 and later).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import fx

from xformopt.kernels.float_formats import FORMATS
from xformopt.match import is_call, operand, xf
from xformopt.passes.quantize.support.float_grids import FloatGrid, PackedFloats, ScaleKind, fit_float_grid
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.quantize.support.uniform_grids import weights_of
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context, PassResult
from xformopt.program import Program, value_of
from xformopt.reconstruction import Settings, reconstruct
from xformopt.rewrite import Editor, Reject

__all__ = ["QuantizeFloat"]

FormatName = Literal["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"]


@dataclass(frozen=True)
class QuantizeFloat(QuantizeLinears):
    """Store the weights of linear layers in floating point of few bits.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay as they are.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        format: Of weights.
        scale: How a group's scale is stored: e8m0, a power of two (MX); fp16; or e4m3 beside one number per matrix.
        group: Neighbouring input channels that share a scale: 16, 32, 64, 128 or 256, or 0 for one scale per row.
        rounding: nearest; or trained on calibration data, block by block.
        activations: The format that inputs of the layers are rounded to at run time, with a scale per token; simulated.
            None: they stay as they are.
        iterations: Training steps of each block, at most.
        minutes: What training may take in all; steps are reduced to what fits.  None: no limit.

    """

    format: FormatName = "fp4_e2m1"
    scale: ScaleKind = "e8m0"
    group: int = 32
    rounding: Literal["nearest", "trained"] = "nearest"
    activations: FormatName | None = None
    iterations: int = 400
    minutes: float | None = 10.0

    sources: ClassVar[tuple[str, ...]] = (
        "Chen, Mills and Niu, FP4DiT, arXiv 2503.15465",
        "Rouhani et al., Microscaling Data Formats, arXiv 2310.10537",
        "Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433",
        "Nagel et al., Up or Down? Adaptive Rounding, arXiv 2004.10568",
    )

    def __post_init__(self) -> None:
        if self.group not in (0, 16, 32, 64, 128, 256):
            raise ValueError(f"group must be 0, 16, 32, 64, 128 or 256, but is {self.group}")
        Settings(iterations=self.iterations, minutes=self.minutes)

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Round all weights; return what quantizes one layer."""
        return self.prepare(program, context, layers)[0]

    def prepare(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> tuple[Replace, tuple[str, ...]]:
        """Round all weights; return what quantizes one layer, and how training went."""
        made: dict[str, PackedFloats] = {}
        notes: tuple[str, ...] = ()
        if self.rounding == "trained":
            made, notes = self._trained(program, context, layers)

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            name = parts.weight_name
            if (reason := self._refusal(parts.weight.shape[1])) is not None:
                return Reject(reason)
            if name not in made:
                made[name] = self._grid(program, name).nearest(parts.weight)
            stored = made[name].parameters(editor, name)
            if self.activations is not None:
                source = editor.call(xf.fake_quantize_float, source, format=self.activations)
            return editor.call(xf.float_weight_linear, source, *stored, *bias_operand(parts), format=self.format)

        return replace_layer, notes

    def quantize(self, program: Program, replace_layer: Replace, kept: Mapping[str, str]) -> PassResult:
        """Quantize all layers but those in ``kept``; those that read one value share its rounded form."""
        result = super().quantize(program, replace_layer, kept)
        return replace(result, program=_with_shared_rounding(result.program)) if result.changed else result

    def _trained(
        self, program: Program, context: Context, layers: Sequence[fx.Node]
    ) -> tuple[dict[str, PackedFloats], tuple[str, ...]]:
        names = weights_of(layers, lambda node: self._refusal(value_of(operand(node, 1)).shape[1]) is None)
        grids = {name: self._grid(program, name) for name in names}
        found = reconstruct(
            program,
            self._with_rounded_inputs(program, layers),
            context.calibration,
            {name: partial(grids[name].variable, program.parameters[name]) for name in names},
            Settings(iterations=self.iterations, minutes=self.minutes, seed=context.seed),
            describes=(self.name, asdict(self)),
            progress=context.progress,
        )
        made = {name: grids[name].packed(program.parameters[name], up) for name, up in found.results.items()}
        return made, (found.summary(),)

    def _with_rounded_inputs(self, program: Program, layers: Sequence[fx.Node]) -> Program:
        """Return the program with only the inputs of layers rounded."""
        if self.activations is None:
            return program
        changed = program.copy()
        editor, names = Editor(changed), {node.name for node in layers}
        for node in list(changed.nodes()):
            if node.name in names and self._refusal(value_of(operand(node, 1)).shape[1]) is None:
                # in place, as blocks are found by the names of their values
                rounded = editor.at(node).call(xf.fake_quantize_float, operand(node), format=self.activations)
                node.update_arg(0, rounded)
        return changed

    def _grid(self, program: Program, name: str) -> FloatGrid:
        weight = program.parameters[name]
        return fit_float_grid(weight, format=self.format, kind=self.scale, group=self.group or weight.shape[1])

    def _refusal(self, columns: int) -> str | None:
        if self.group and columns % self.group:
            return f"groups of {self.group} do not divide its {columns} input channels"
        bits = FORMATS[self.format].bits
        if columns * bits % (24 if bits == 6 else 8):
            return f"rows of {columns} codes of {bits} bits do not fill whole bytes"
        return None


def _with_shared_rounding(program: Program) -> Program:
    """Return the program with each value rounded once."""
    shared = program.copy()
    first: dict[tuple[fx.Node, object], fx.Node] = {}
    for node in list(shared.nodes()):
        if is_call(node, xf.fake_quantize_float):
            kept = first.setdefault((operand(node), node.kwargs["format"]), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
    return shared.drop_unused()
