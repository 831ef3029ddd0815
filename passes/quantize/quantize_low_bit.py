"""Round weights and activations to so few bits that no CPU kernel executes them: W6A6, W4A8, W4A4.

    y = x W^T + b    ->    y = Q(x) W^^T + b,    W^ = (codes - zero) * scale, a scale and a zero per output channel

Everything is rounded to nearest.  Activations have one asymmetric range for the whole tensor, found on calibration data
and widened to hold zero, or one for each token as it comes.  Both products of attention are between rounded operands,
too; the softmax, norms, and what is no linear layer stay as they are.

**Approximate**; static ranges need calibration data.  Run it after the passes that look for linear layers.  Weights are
stored in few bits and computed in float; the activations' quantization is **simulated**: it costs time and saves none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from xformopt.match import operand
from xformopt.observers import Method, Range, affine_parameters, observe_ranges
from xformopt.passes.quantize.support.low_bit import (
    Dynamic,
    Layer,
    LowBitPass,
    Plan,
    Prepared,
    Slot,
    Uniform,
    nearest_rows,
    refuse_constants,
)
from xformopt.passes.weights import is_skipped, linear_layers
from xformopt.pipeline import Context

__all__ = ["QuantizeLowBit"]


@dataclass(frozen=True)
class QuantizeLowBit(LowBitPass):
    """Round weights and activations to few bits; activations are simulated.

    Attributes:
        weight_bits: Of a weight's code: 2, 3, 4, 6 or 8.
        activation_bits: Of an activation's code, 2 to 8; simulated.
        attention: Quantize the operands of both products of attention, too.
        skip: Shell patterns of module paths or weight names that stay in floating point.
        activations: Which range activations have: static, one per tensor found on calibration data; token, one for each
            token as it comes.
        observer: How a static range is chosen from what was seen.
        percentile: The share of values, in percent, that the observer percentile keeps.

    """

    activations: Literal["static", "token"] = "static"
    observer: Method = "min-max"
    percentile: float = 99.99

    sources: ClassVar[tuple[str, ...]] = (
        "Jacob et al., arXiv 1712.05877, section 2.1",
        "Krishnamoorthi, arXiv 1806.08342, section 3 (post-training quantization, weights per channel)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (50, 100], but is {self.percentile}")

    def plan(self, prepared: Prepared, slots: Sequence[Slot], context: Context) -> Plan:
        """Find a range for every slot; round every weight to nearest."""
        program = prepared.program
        weights = {n.name: str(operand(n, 1).target) for n in linear_layers(program) if not is_skipped(n, self.skip)}
        rounded = {
            name: Layer(nearest_rows(program.parameters[name], self.weight_bits).packed(), self.weight_bits)
            for name in dict.fromkeys(weights.values())
        }
        layers = {node: rounded[name] for node, name in weights.items()}
        if self.activations == "token":
            return Plan({(slot.node, slot.operand): Dynamic(self.activation_bits) for slot in slots}, layers)
        ranges = observe_ranges(
            program,
            context.calibration,
            [slot.value for slot in slots],
            method=self.observer,
            percentile=self.percentile,
            bits=self.activation_bits,
            progress=context.progress,
        )
        refuse_constants(slots, _ends(ranges))
        found = {value: _uniform(each, self.activation_bits) for value, each in ranges.items()}
        return Plan({(slot.node, slot.operand): found[slot.value] for slot in slots}, layers)


def _ends(ranges: Mapping[str, Range]) -> dict[str, torch.Tensor]:
    return {name: torch.stack((found.low[0], found.high[0])) for name, found in ranges.items()}


def _uniform(found: Range, bits: int) -> Uniform:
    scale, zero = affine_parameters(found, bits)
    return Uniform(bits, float(scale[0]), int(zero[0]))
