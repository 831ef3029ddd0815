"""Compute linear layers in 8-bit integers, with the range of activations taken as they come.

    y = x W^T + b    ->    y = (codes(x) - zero) codes(W)^T * (scale_x * scale_W) + b

Weights: signed, symmetric, one scale per output channel.  Activations: unsigned, asymmetric, one range for the whole
tensor at each call, so that what is computed for one input depends a little on what it is batched with.

**Approximate**; needs no data.  Run it after the passes that look for linear layers.  The layers execute in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import xf
from xformopt.passes.quantize.support.quantization import quantize_rows
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Editor

__all__ = ["QuantizeDynamic"]


@dataclass(frozen=True)
class QuantizeDynamic(QuantizeLinears):
    """Compute linear layers in 8-bit integers with dynamic ranges of activations.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        reduce_range: Weights within 7 bits, for x86 without VNNI, which saturates sums of two products at 16 bits.

    """

    reduce_range: bool = False

    sources: ClassVar[tuple[str, ...]] = ("Jacob et al., arXiv 1712.05877, section 2",)

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Return what quantizes one layer; layers that share a weight share its codes."""
        made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node:
            name = parts.weight_name
            if name not in made:
                made[name] = quantize_rows(parts.weight, reduce_range=self.reduce_range)
            codes, scale = made[name]
            weight, step = editor.parameter(f"{name}.codes", codes), editor.parameter(f"{name}.scale", scale)
            return editor.call(xf.quantized_linear, source, weight, step, *bias_operand(parts))

        return replace_layer
