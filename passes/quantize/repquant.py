"""Round weights and activations to few bits, with quantizers per channel behind norms made one per tensor (RepQuant).

*Norms.*  Their outputs have asymmetric quantizers per channel, either end of each range clipped where the squared error
is least; these become one quantizer by an exact change of the norm and its readers:

    s~ = mean(s), z~ = round(mean(z)), r = s / s~, t = z - z~:
    g' = g / r,  c' = (c + s t) / r,  W' = W diag(r),  b' = b - W (s t)

A reader that is no linear layer, such as the residual of a model that normalizes behind its blocks, gets the original
value by an explicit product per channel.

*Softmax.*  ``k = clip(round(-2 log2(x / s)), 0, 2^b - 1)``, ``x^ = s 2^(-k / 2)``: base sqrt 2, which runs in base 2 as
``s (1 + [k odd] (sqrt 2 - 1)) 2^(-ceil(k / 2))``.

*Weights* are quantized after all that: refitted to the quantized inputs by least squares, then rounded column after
column.  Other activations are uniform, one clipped range per tensor.

**Approximate**; needs calibration data.  Weights are stored in few bits and computed in float; the activations'
quantization is **simulated**: it costs time and saves none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xformopt.match import arguments, operand
from xformopt.passes.quantize.support.low_bit import (
    Layer,
    Logarithmic,
    LowBitPass,
    Plan,
    Prepared,
    Quantizer,
    Slot,
    nearest_rows,
    refuse_constants,
)
from xformopt.passes.quantize.support.norm_quantizers import quantize_norms, uniform_of
from xformopt.passes.quantize.support.refitting import observe_moments, refitted
from xformopt.passes.samples import sample_rows
from xformopt.passes.weights import is_skipped, linear_layers
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["Repquant"]


@dataclass(frozen=True)
class Repquant(LowBitPass):
    """Round weights and activations to few bits by scale reparameterization; activations are simulated.

    Attributes:
        weight_bits: Of a weight's code: 2, 3, 4, 6 or 8.
        activation_bits: Of an activation's code, 2 to 8; simulated.
        attention: Quantize the operands of both products of attention, too.
        skip: Shell patterns of module paths or weight names that stay in floating point.
        clip: Clip the ranges of channels on either side.
        reconstruct: Refit weights to quantized inputs; else they are rounded to nearest.
        flush: Attention weights below the smallest level become 0, as in the authors' code; else that level, as in
            their formula, which adds up over many keys.

    """

    clip: bool = True
    reconstruct: bool = True
    flush: bool = True

    sources: ClassVar[tuple[str, ...]] = (
        "Li et al., RepQuant, arXiv 2402.05628",
        "Li et al., RepQ-ViT, arXiv 2212.08254, sections 3.2 and 3.3",
    )

    def prepare(self, program: Program, context: Context) -> Prepared:
        """Make one quantizer of those behind each norm."""
        return quantize_norms(program, context, bits=self.activation_bits, skip=self.skip, clip=self.clip)

    def plan(self, prepared: Prepared, slots: Sequence[Slot], context: Context) -> Plan:
        """Choose the other quantizers on samples; quantize every weight for what reaches it."""
        program = prepared.program
        rows = sample_rows(program, context.calibration, [slot.value for slot in slots])
        refuse_constants(slots, rows)
        chosen: dict[str, Quantizer] = {}
        for slot in slots:
            if slot.value not in chosen:
                settled = prepared.settled.get(slot.value)
                chosen[slot.value] = settled or self._quantizer(slot, rows[slot.value])
        layers = self._layers(program, chosen, context)
        return Plan({(slot.node, slot.operand): chosen[slot.value] for slot in slots}, layers)

    def _quantizer(self, slot: Slot, rows: torch.Tensor) -> Quantizer:
        if slot.operand == "weights":
            return Logarithmic(self.activation_bits, float(rows.max()), 1, 2, flush=self.flush)
        return uniform_of(rows, self.activation_bits)

    def _layers(self, program: Program, chosen: Mapping[str, Quantizer], context: Context) -> dict[str, Layer]:
        nodes = [node for node in linear_layers(program) if not is_skipped(node, self.skip)]
        readers = Counter(str(operand(node, 1).target) for node in nodes)
        # a weight that several layers read is one for all their inputs
        shared = {
            name: Layer(nearest_rows(program.parameters[name], self.weight_bits).packed(), self.weight_bits)
            for name, count in readers.items()
            if count > 1 or not self.reconstruct
        }
        layers = {n.name: shared[name] for n in nodes if (name := str(operand(n, 1).target)) in shared}
        left = [node for node in nodes if node.name not in layers]
        inputs = {operand(node).name: chosen[operand(node).name] for node in left}
        for seen in observe_moments(program, context.calibration, inputs, context.progress):
            for node in left:
                if (moments := seen.get(operand(node).name)) is not None:
                    context.progress("quantizing weights", len(layers), len(nodes))
                    weight, bias = program.parameters[str(operand(node, 1).target)], arguments(node)["bias"]
                    before = None if bias is None else program.parameters[str(bias.target)]
                    layers[node.name] = refitted(weight, before, moments, self.weight_bits)
        return layers
