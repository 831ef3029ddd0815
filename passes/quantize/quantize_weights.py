"""Store the weights of linear layers in 4 or 8 bits and multiply in floating point.

    y = x W^T + b    ->    y = x W^^T + b,    W^ = (codes - zero) * scale, one scale per group of input channels

**Approximate**; rounding to the nearest code needs no data, GPTQ needs calibration data.  Run it after the passes that
look for linear layers.  The layers are stored in few bits, and computed in float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.match import operand, xf
from xformopt.passes.gram_matrices import gram_matrices
from xformopt.passes.quantize.support.gptq import gptq
from xformopt.passes.quantize.support.quantization import PackedGroups, check_groups, quantize_groups
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context
from xformopt.program import Program, value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["QuantizeWeights"]


@dataclass(frozen=True)
class QuantizeWeights(QuantizeLinears):
    """Store the weights of linear layers in few bits.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        bits: Of a code, 4 or 8.
        group: Neighbouring input channels that share a scale: 16, 32, 64, 128 or 256.
        symmetric: Zero is the middle code, instead of a code of each group's own.
        method: How weights are rounded: nearest to the nearest code; gptq so that the layer's output on calibration
            data changes least.

    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    method: Literal["nearest", "gptq"] = "nearest"

    sources: ClassVar[tuple[str, ...]] = (
        "Dettmers and Zettlemoyer, arXiv 2212.09720 (block-wise weights)",
        "Frantar et al., GPTQ, arXiv 2210.17323",
    )

    def __post_init__(self) -> None:
        check_groups(self.bits, self.group)

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Return what quantizes one layer; layers that share a weight share its codes."""
        made = self._rounded_on_data(program, context, layers) if self.method == "gptq" else {}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            name, columns = parts.weight_name, parts.weight.shape[1]
            if columns % self.group:
                return Reject(f"groups of {self.group} do not divide its {columns} input channels")
            if name not in made:
                made[name] = self._nearest(parts.weight)
            stored = made[name].parameters(editor, name)
            return editor.call(xf.weight_only_linear, source, *stored, *bias_operand(parts), bits=self.bits)

        return replace_layer

    def _nearest(self, weight: torch.Tensor) -> PackedGroups:
        found = quantize_groups(weight, bits=self.bits, group=self.group, symmetric=self.symmetric)
        return found.packed()

    def _rounded_on_data(
        self, program: Program, context: Context, layers: Sequence[fx.Node]
    ) -> dict[str, PackedGroups]:
        """Return the codes of every weight that one layer reads; one that several read is rounded to nearest."""
        readers = Counter(str(operand(node, 1).target) for node in layers)
        divided = [node for node in layers if value_of(operand(node, 1)).shape[1] % self.group == 0]
        alone = [node for node in divided if readers[str(operand(node, 1).target)] == 1]
        made: dict[str, PackedGroups] = {}
        sources = list(dict.fromkeys(operand(node).name for node in alone))
        for seen in gram_matrices(program, context.calibration, sources, context.progress):
            for node in alone:
                if (found := seen.get(operand(node).name)) is not None:
                    context.progress("rounding weights", len(made), len(alone))
                    name = str(operand(node, 1).target)
                    weight = program.parameters[name]
                    codes = gptq(weight, found.gram, bits=self.bits, group=self.group, symmetric=self.symmetric)
                    made[name] = codes.packed()
        return made
