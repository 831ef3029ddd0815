"""Round weights and activations to few bits, with a base of logarithms that fits what a softmax or GELU gives (AdaLog).

*Softmax, GELU.*  Codes are ``k = round(-(r / q) log2(x / s))``, r = 37 fixed, and q searched: 0 where k is 2^b or more.
They stand for ``s 2^(-floor(k q / r)) table[(k q) mod r]``, a shift and a small table of b + 1 bits.  Behind a softmax
s = 1.  What is behind a GELU is made positive first, ``x + c`` with c = 0.16997, and the next layer's bias takes the
shift back: ``b' = b - c rowsum(W^)``.

*Norms* have quantizers per channel made one per tensor, as in ``repquant``.  Other activations are uniform.

*Search.*  Scale and zero point of weights (per output channel) and of activations, scale and q of logarithms: each such
that the output of the product changes least in the square on samples, coarse to fine, weights and activations by turns.

**Approximate**; needs calibration data.  Weights are stored in few bits and computed in float; the activations'
quantization is **simulated**: it costs time and saves none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.quantize.support.layer_search import LinearSearch, ProductSearch, is_behind_gelu, split_heads
from xformopt.passes.quantize.support.low_bit import (
    Layer,
    LowBitPass,
    Plan,
    Prepared,
    Quantizer,
    Slot,
    refuse_constants,
)
from xformopt.passes.quantize.support.norm_quantizers import quantize_norms
from xformopt.passes.quantize.support.quantization import PackedGroups
from xformopt.passes.samples import sample_items, sample_rows
from xformopt.passes.weights import is_skipped, linear_layers
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["Adalog"]


@dataclass(frozen=True)
class Adalog(LowBitPass):
    """Round weights and activations to few bits with adaptive logarithms; activations are simulated.

    Attributes:
        weight_bits: Of a weight's code: 2, 3, 4, 6 or 8.
        activation_bits: Of an activation's code, 2 to 8; simulated.
        attention: Quantize the operands of both products of attention, too.
        skip: Shell patterns of module paths or weight names that stay in floating point.
        samples: Rows of each layer's input that the search looks at.
        rounds: How often weights and activations are searched by turns.

    """

    samples: int = 256
    rounds: int = 3

    sources: ClassVar[tuple[str, ...]] = ("Wu et al., AdaLog, ECCV 2024, arXiv 2407.12951",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples must be positive, but is {self.samples}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be positive, but is {self.rounds}")

    def prepare(self, program: Program, context: Context) -> Prepared:
        """Make one quantizer of those behind each norm."""
        return quantize_norms(program, context, bits=self.activation_bits, skip=self.skip)

    def plan(self, prepared: Prepared, slots: Sequence[Slot], context: Context) -> Plan:
        """Search quantizers of linear layers, then those of attention."""
        program = prepared.program
        inputs = [slot for slot in slots if slot.operand == "x"]
        rows = sample_rows(program, context.calibration, [slot.value for slot in inputs], rows=self.samples)
        refuse_constants(inputs, rows)
        quantizers: dict[tuple[str, str], Quantizer] = {}
        layers: dict[str, Layer] = {}
        packed: dict[str, PackedGroups] = {}
        found = self._linear_groups(program)
        for index, (value, nodes) in enumerate(found.items()):
            context.progress("searching quantizers of linear layers", index, len(found))
            settled = prepared.settled.get(value)
            activation, made = self._searched(program, nodes, rows[value], settled, packed)
            layers |= made
            quantizers |= {(node.name, "x"): activation for node in nodes}
        quantizers |= self._attention(program, [slot for slot in slots if slot.operand != "x"], context)
        return Plan(quantizers, layers)

    def _linear_groups(self, program: Program) -> dict[str, list[fx.Node]]:
        """Return the layers to quantize by the value that they read."""
        groups: dict[str, list[fx.Node]] = {}
        for node in linear_layers(program):
            if not is_skipped(node, self.skip):
                groups.setdefault(operand(node).name, []).append(node)
        return groups

    def _searched(
        self,
        program: Program,
        nodes: Sequence[fx.Node],
        rows: torch.Tensor,
        settled: Quantizer | None,
        packed: dict[str, PackedGroups],
    ) -> tuple[Quantizer, dict[str, Layer]]:
        """Return the quantizer of a value, and the new parameters of the layers that read it; ``packed`` is by name."""
        names = [str(operand(node, 1).target) for node in nodes]
        weights = [program.parameters[name] for name in names]
        readers = Counter(str(operand(node, 1).target) for node in linear_layers(program))
        # a weight that several layers read is one for all their inputs
        free = [torch.full((len(program.parameters[name]),), readers[name] == 1) for name in names]
        search = LinearSearch(
            rows,
            torch.cat(weights),
            torch.cat(free),
            self.weight_bits,
            self.activation_bits,
            is_log=is_behind_gelu(operand(nodes[0])),
            settled=settled,
        )
        activation, codes = search.run(self.rounds)
        layers: dict[str, Layer] = {}
        start = 0
        for node, name, weight in zip(nodes, names, weights, strict=True):
            part = codes.rows(start, start + len(weight))
            bias = arguments(node)["bias"]
            before = None if bias is None else program.parameters[str(bias.target)]
            layers[node.name] = Layer(
                packed.setdefault(name, part.packed()), self.weight_bits, search.bias(part, before)
            )
            start += len(weight)
        return activation, layers

    def _attention(self, program: Program, slots: Sequence[Slot], context: Context) -> dict[tuple[str, str], Quantizer]:
        """Return the quantizers of attention's operands."""
        if not slots:
            return {}
        items = sample_items(program, context.calibration, [slot.value for slot in slots])
        refuse_constants(slots, items)
        nodes = {node.name: node for node in program.nodes()}
        quantizers: dict[tuple[str, str], Quantizer] = {}
        names = list(dict.fromkeys(slot.node for slot in slots))
        for index, name in enumerate(names):
            context.progress("searching quantizers of attention", index, len(names))
            left, right = (slot for slot in slots if slot.node == name)
            search = _product(nodes[name], items[left.value], items[right.value], self.activation_bits)
            found = search.run(self.rounds)
            quantizers |= {(name, slot.operand): each for slot, each in zip((left, right), found, strict=True)}
        return quantizers


def _product(node: fx.Node, left: torch.Tensor, right: torch.Tensor, bits: int) -> ProductSearch:
    """Return the search of one of attention's products: scores without masks, or values by their weights."""
    given: Mapping[str, int] = arguments(node)
    heads, kv_heads = given["heads"], given["kv_heads"]
    if is_call(node, xf.attention_weights):
        keys = split_heads(right, kv_heads, heads).transpose(-1, -2)
        return ProductSearch(split_heads(left, heads, heads), keys, bits, is_log=False)
    return ProductSearch(left, split_heads(right, kv_heads, heads), bits, is_log=True)
