"""Store the weights of linear layers as signed powers of two, by which hardware multiplies with a shift (ShiftAddViT).

    y = x W^T + b    ->    y = x W^^T + b,    w^ = sign(w) 2^round(log2|w|)

The exponents of a matrix end at that of its largest weight, and begin ``2^exponent_bits - 2`` below; smaller weights
are 0.  Sign and exponent are stored in one code of 5 or 6 bits.

**Approximate**, and published with fine-tuning behind it; needs no data.  Run it after the passes that look for linear
layers.  The weights are stored in few bits, and computed in float: runtimes have no product by shifts.

These are the shift layers of ShiftAddViT's attention.  Its binary queries and keys in linear order are
``linearize-eco``, whose learned hash functions it takes over.  Its mixture of experts, in which a router sends each
token of an MLP to a layer of products or one of shifts, is no pass here: it saves what shifts cost less.  Where they
are computed as products, both experts cost the same; a loss that weighs experts by their measured latency then shares
tokens out evenly, and the second expert only adds its weights, the router, and the loss of its rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.kernels.packing import pack
from xformopt.match import xf
from xformopt.passes.attention_layers import attention_linears
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, Replace
from xformopt.passes.weights import LinearParts, bias_operand
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Editor, Reject

__all__ = ["QuantizeShift", "shift_codes"]


@dataclass(frozen=True)
class QuantizeShift(QuantizeLinears):
    """Store the weights of linear layers as signed powers of two.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.
        exponent_bits: Of an exponent, 4 or 5; the sign takes one more.
        layers: Those of attention, as published, or all linear layers.

    """

    exponent_bits: int = 4
    layers: Literal["attention", "all"] = "attention"

    sources: ClassVar[tuple[str, ...]] = (
        "You et al., ShiftAddViT, arXiv 2306.06446, section 4.2",
        "Elhoushi et al., DeepShift, arXiv 1905.13298, equation 2",
    )

    def __post_init__(self) -> None:
        if self.exponent_bits not in (4, 5):
            raise ValueError(f"exponent_bits must be 4 or 5, but is {self.exponent_bits}")

    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Return what quantizes one layer; layers that share a weight share its codes."""
        chosen = attention_linears(program) if self.layers == "attention" else {node.name for node in layers}
        bits = self.exponent_bits + 1
        made: dict[str, tuple[torch.Tensor, int]] = {}

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            if parts.node.name not in chosen:
                return Reject("it belongs to no attention (layers=attention)")
            name = parts.weight_name
            if name not in made:
                codes, top = shift_codes(parts.weight, bits=bits)
                made[name] = pack(codes, bits), top
            stored, top = made[name]
            weight = editor.parameter(f"{name}.codes", stored)
            return editor.call(xf.shift_linear, source, weight, *bias_operand(parts), bits=bits, top=top)

        return replace_layer


def shift_codes(weight: torch.Tensor, *, bits: int) -> tuple[torch.Tensor, int]:
    """Return the codes of ``xf.shift_linear``, uint8 like ``weight``, and the largest exponent."""
    last = 2 ** (bits - 1) - 1
    exponents = weight.abs().double().log2().round()
    largest = exponents.max()
    top = int(largest) if bool(largest.isfinite()) else 0
    places = (exponents - (top - last)).clamp(min=0)
    negative = (weight < 0) & (places > 0)
    return (places + negative * (last + 1)).to(torch.uint8), top
