"""Round the weights of linear layers up or down as suits the output of their block on calibration data.

    W^ = s clip(floor(W / s) + h(V) + z, 0, 2^b - 1) - s z,    V trained, h(V) 0 or 1 in the end

Layers are trained block by block, each block against the original's output, on what reaches it behind the blocks that
are rounded already (:mod:`xformopt.reconstruction`).  An interrupted run goes on where it was.

**Tuned**: takes gradient steps on calibration data.  Run it after the passes that look for linear layers.  The layers
are stored in few bits and computed in float, or executed in 8-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.match import operand, xf
from xformopt.passes.quantize.support.quantization import GroupCodes
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.quantize.support.uniform_grids import UniformGrid, fit_grid, weights_of
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context, Effect
from xformopt.program import Program, value_of
from xformopt.reconstruction import Settings, reconstruct
from xformopt.rewrite import Editor, Reject

__all__ = ["Adaround", "check_grid"]


@dataclass(frozen=True)
class Adaround(QuantizeLinears):
    """Round the weights of linear layers by training which way.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        bits: Of a code, 4 or 8.
        group: Neighbouring input channels that share a scale: 16, 32, 64, 128 or 256, or 0 for one scale per row.
        symmetric: Zero is the middle code, instead of a code of each group's own.
        search: Narrow ranges to where rounding to nearest has the least squared error.
        compute: What the layers execute in: float, stored packed; or int8 with one symmetric scale per row and the
            range of activations taken at run time, stored as bytes.
        iterations: Training steps of each block, at most.
        minutes: What training may take in all; steps are reduced to what fits.  None: no limit.

    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    search: bool = True
    compute: Literal["float", "int8"] = "float"
    iterations: int = 400
    minutes: float | None = 10.0

    effect: ClassVar[Effect] = "tuned"
    sources: ClassVar[tuple[str, ...]] = (
        "Nagel et al., Up or Down? Adaptive Rounding, arXiv 2004.10568",
        "Li et al., BRECQ, arXiv 2102.05426 (blocks)",
    )

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group)
        Settings(iterations=self.iterations, minutes=self.minutes)
        if self.compute == "int8" and (self.group or not self.symmetric):
            raise ValueError("compute=int8 takes one symmetric scale per row: give group=0 and symmetric=true")

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Train the rounding of all weights; return what quantizes one layer."""
        return self.prepare(program, context, layers)[0]

    def prepare(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> tuple[Replace, tuple[str, ...]]:
        """Train the rounding of all weights; return what quantizes one layer, and how training went."""
        trained = weights_of(layers, lambda node: self._refusal(value_of(operand(node, 1)).shape[1]) is None)
        grids = {name: self._grid(program.parameters[name]) for name in trained}
        found = reconstruct(
            program,
            program,
            context.calibration,
            {name: partial(grids[name].variable, program.parameters[name]) for name in trained},
            Settings(iterations=self.iterations, minutes=self.minutes, seed=context.seed),
            describes=(self.name, asdict(self)),
            progress=context.progress,
        )
        made = {name: grids[name].codes(program.parameters[name], found.results[name]) for name in found.results}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            if (reason := self._refusal(parts.weight.shape[1])) is not None:
                return Reject(reason)
            if parts.weight_name not in made:
                made[parts.weight_name] = self._nearest(parts.weight)
            return self._layer(editor, parts, source, made[parts.weight_name])

        return replace_layer, (found.summary(),)

    def _layer(self, editor: Editor, parts: LinearParts, source: fx.Node, codes: GroupCodes) -> fx.Node:
        name, bias = parts.weight_name, bias_operand(parts)
        if self.compute == "float":
            stored = codes.packed().parameters(editor, name)
            return editor.call(xf.weight_only_linear, source, *stored, *bias, bits=self.bits)
        signed = (codes.codes.to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
        weight = editor.parameter(f"{name}.codes", signed)
        scale = editor.parameter(f"{name}.scale", codes.scale[:, 0].contiguous())
        return editor.call(xf.quantized_linear, source, weight, scale, *bias)

    def _refusal(self, columns: int) -> str | None:
        if self.group and columns % self.group:
            return f"groups of {self.group} do not divide its {columns} input channels"
        if columns * self.bits % 8:
            return f"rows of {columns} codes of {self.bits} bits do not fill whole bytes"
        return None

    def _grid(self, weight: torch.Tensor) -> UniformGrid:
        return fit_grid(
            weight,
            bits=self.bits,
            group=self.group or weight.shape[1],
            symmetric=self.symmetric,
            search=self.search,
        )

    def _nearest(self, weight: torch.Tensor) -> GroupCodes:
        grid = self._grid(weight)
        return grid.codes(weight, grid.variable(weight).untrained())


def check_grid(bits: int, group: int) -> None:
    """Raise ValueError for options that no kernel takes."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, but is {bits}")
    if group not in (0, 16, 32, 64, 128, 256):
        raise ValueError(f"group must be 0, 16, 32, 64, 128 or 256, but is {group}")
