"""Give the weights of linear layers two or three values, with scales from statistics (TBT).

    binary:     W^ = a sign(W - m),                          a = mean|W|
    ternary:    W^ = a round(clip((W - m) / a, -1, 1)),      a = 4/3 mean|W - m|,    m = mean(W)
    activations:    x^ = s round(clip(x / s, Qn, Qp)),       s is learned; it starts at 2 mean|x| / sqrt(Qp)

``trainable`` keeps the weights in float and rounds them as the program runs, with gradients that go straight through;
``pack-ternary`` packs them once they are trained.  Otherwise they are packed at once, 1 or 2 bits each.

**Approximate**: published with distillation behind it, and without any training what comes out is noise; a program that
was not trained this way is for measuring sizes and for training, not for use.  Activations in few bits are simulated;
weights are stored in few bits, and computed in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.match import operand, xf
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.quantize.support.ternary import Elastic, elastic_ranges, packed_levels
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Editor

__all__ = ["QuantizeTernary"]


@dataclass(frozen=True)
class QuantizeTernary(QuantizeLinears):
    """Give the weights of linear layers two or three values.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        weights: ternary for three values, binary for two.
        per_row: Mean and scale of each row, instead of the whole matrix as published.
        activation_bits: Of the layers' inputs, 2 to 8; none leaves them in float.
        trainable: Keep weights in float and round them as the program runs.

    """

    weights: Literal["ternary", "binary"] = "ternary"
    per_row: bool = False
    activation_bits: int | None = 8
    trainable: bool = False

    sources: ClassVar[tuple[str, ...]] = (
        "Liu et al., Binary and Ternary Natural Language Generation, arXiv 2306.01841, section 3",
        "Esser et al., LSQ, arXiv 1902.08153 (first scales of activations)",
    )

    def __post_init__(self) -> None:
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits must lie in [2, 8] or be none, but is {self.activation_bits}")

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Find the activations' first scales; return what quantizes one layer."""
        sources = {node.name: operand(node).name for node in layers}
        elastic: dict[str, Elastic] = {}
        if self.activation_bits is not None:
            elastic = elastic_ranges(program, context.calibration, sources.values(), bits=self.activation_bits)
        bits = 1 if self.weights == "binary" else 2
        made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node:
            value = sources[parts.node.name]
            if (found := elastic.get(value)) is not None:
                scale = editor.parameter(f"{value}.scale", found.scale)
                zero = editor.parameter(f"{value}.zero", found.zero)
                source = editor.call(xf.fake_quantize, source, scale, zero, bits=self.activation_bits)
            if self.trainable:
                rounded = editor.call(xf.ternary_weight, operand(parts.node, 1), bits=bits, per_row=self.per_row)
                return editor.call(xf.linear, source, rounded, *bias_operand(parts))
            name = parts.weight_name
            if name not in made:
                made[name] = packed_levels(parts.weight, bits=bits, per_row=self.per_row)
            codes, step = made[name]
            stored = (editor.parameter(f"{name}.codes", codes), editor.parameter(f"{name}.scale", step))
            return editor.call(xf.ternary_linear, source, *stored, *bias_operand(parts), bits=bits)

        return replace_layer
