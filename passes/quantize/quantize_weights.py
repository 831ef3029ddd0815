"""Store the weights of linear layers in 4 or 8 bits and multiply in floating point.

    y = x W^T + b    ->    y = x W^^T + b,    W^ = (codes - zero) * scale, one scale per group of input channels

**Approximate**; round to nearest needs no data.  Run it after the passes that look for linear layers.  The layers are
stored in few bits, and computed in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xformopt.match import xf
from xformopt.passes.quantization import PackedGroups, check_groups, quantize_groups
from xformopt.passes.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context
from xformopt.program import Program
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

    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False

    sources: ClassVar[tuple[str, ...]] = ("Dettmers and Zettlemoyer, arXiv 2212.09720 (block-wise weights)",)

    def __post_init__(self) -> None:
        check_groups(self.bits, self.group)

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Return what quantizes one layer; layers that share a weight share its codes."""
        made: dict[str, PackedGroups] = {}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            name, columns = parts.weight_name, parts.weight.shape[1]
            if columns % self.group:
                return Reject(f"groups of {self.group} do not divide its {columns} input channels")
            if name not in made:
                found = quantize_groups(parts.weight, bits=self.bits, group=self.group, symmetric=self.symmetric)
                made[name] = found.packed()
            stored = made[name].parameters(editor, name)
            return editor.call(xf.weight_only_linear, source, *stored, *bias_operand(parts), bits=self.bits)

        return replace_layer
