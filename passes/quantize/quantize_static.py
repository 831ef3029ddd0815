"""Compute linear layers in 8-bit integers, with ranges of activations found on calibration data.

    y = x W^T + b    ->    y = (codes(x) - zero) codes(W)^T * (scale_x * scale_W) + b,    scale_x and zero constants

Weights: signed, symmetric, one scale per output channel.  Activations: unsigned, asymmetric, one range per layer input;
what lies outside is clipped.

**Approximate**; needs calibration data.  Run it after the passes that look for linear layers.  The layers execute in
integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.match import operand, xf
from xformopt.observers import Method, Range, affine_parameters, observe_ranges
from xformopt.passes.quantize.support.quantization import quantize_rows
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor

__all__ = ["QuantizeStatic"]


@dataclass(frozen=True)
class QuantizeStatic(QuantizeLinears):
    """Compute linear layers in 8-bit integers with calibrated ranges of activations.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        observer: How a range is chosen from what was seen.
        percentile: The share of values, in percent, that the observer percentile keeps.
        reduce_range: Weights within 7 bits, for x86 without VNNI, which saturates sums of two products at 16 bits.

    """

    observer: Method = "min-max"
    percentile: float = 99.99
    reduce_range: bool = False

    sources: ClassVar[tuple[str, ...]] = (
        "Jacob et al., arXiv 1712.05877, section 3",
        "Wu et al., arXiv 2004.09602, section 4 (observers)",
    )

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (50, 100], but is {self.percentile}")

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Calibrate the inputs of ``layers``; return what quantizes one of them."""
        inputs = {node.name: operand(node).name for node in layers}
        found = observe_ranges(
            program,
            context.calibration,
            inputs.values(),
            method=self.observer,
            percentile=self.percentile,
            progress=context.progress,
        )
        # layers that read one value share its range, so that its codes are computed once
        ranges = {operand(node).name: _parameters(node, found[operand(node).name]) for node in layers}
        made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node:
            name = parts.weight_name
            if name not in made:
                made[name] = quantize_rows(parts.weight, reduce_range=self.reduce_range)
            value = inputs[parts.node.name]
            stored = {f"{name}.codes": made[name][0], f"{name}.scale": made[name][1]}
            stored |= {f"{value}.scale": ranges[value][0], f"{value}.zero": ranges[value][1]}
            weight, step, x_scale, x_zero = (editor.parameter(label, tensor) for label, tensor in stored.items())
            bias = bias_operand(parts) or (None,)
            return editor.call(xf.quantized_linear, source, weight, step, *bias, x_scale, x_zero)

        return replace_layer


def _parameters(layer: fx.Node, found: Range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point of a layer's input, as scalars."""
    if bool((found.low >= found.high).all()):
        raise DataError(
            f"On the calibration data, the input of {path_of(layer) or layer.name} is always {float(found.low[0]):g}, "
            f"so it has no range. Give calibration data that differ, or leave the layer out with skip."
        )
    scale, zero = affine_parameters(found)
    return scale[0].clone(), zero[0].clone()
