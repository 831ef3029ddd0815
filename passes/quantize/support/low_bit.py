"""What passes share that quantize weights and activations to so few bits that no CPU kernel executes them.

Weights are stored in few bits, packed.  Activations are rounded and stay floats: their quantization is simulated.  What
is quantized: the inputs of linear layers, and of both products of attention (queries and keys, weights and values).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.kernels.fake_quantize import fake_quantize
from xformopt.kernels.log_quantize import log_quantize
from xformopt.kernels.packing import WIDTHS
from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.fold.eliminate_common_subexpressions import EliminateCommonSubexpressions
from xformopt.passes.quantize.support.quantization import GroupCodes, PackedGroups, quantize_groups
from xformopt.passes.quantize.support.quantized_layers import refuse_repetition
from xformopt.passes.weights import check_weights, is_skipped, linear_layers, linear_parts
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program, path_of, value_of
from xformopt.rewrite import Editor, Fired, Reject, Rejected, rewrite

__all__ = [
    "Dynamic",
    "Layer",
    "Logarithmic",
    "LowBitPass",
    "Plan",
    "Prepared",
    "Quantizer",
    "Slot",
    "Uniform",
    "find_slots",
    "nearest_rows",
    "refuse_constants",
]

aten = torch.ops.aten

_DONE = frozenset({"quantized_linear", "weight_only_linear", "fake_quantize", "log_quantize"})


@dataclass(frozen=True)
class Uniform:
    """Uniform codes in a fixed range: ``scale`` is what one step is worth, ``zero`` the code of zero."""

    bits: int
    scale: float
    zero: int

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point: the same tensors each time, so that operators share them as parameters."""
        return torch.tensor(self.scale, dtype=torch.float32), torch.tensor(self.zero, dtype=torch.int32)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` quantized and dequantized."""
        scale, zero = self.tensors
        return fake_quantize(x, scale.to(x.dtype), zero, bits=self.bits)

    def emit(self, editor: Editor, source: fx.Node, name: str) -> fx.Node:
        """Call the quantizer on ``source``."""
        scale, zero = self.tensors
        operands = (
            editor.parameter(f"{name}.scale", scale.to(value_of(source).dtype)),
            editor.parameter(f"{name}.zero", zero),
        )
        return editor.call(xf.fake_quantize, source, *operands, bits=self.bits)


@dataclass(frozen=True)
class Dynamic:
    """Uniform codes in the range of each token."""

    bits: int

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` quantized and dequantized."""
        return fake_quantize(x, bits=self.bits, per_token=True)

    def emit(self, editor: Editor, source: fx.Node, name: str) -> fx.Node:
        """Call the quantizer on ``source``."""
        return editor.call(xf.fake_quantize, source, bits=self.bits, per_token=True)


@dataclass(frozen=True)
class Logarithmic:
    """Codes for powers of ``2^(numerator / denominator)`` below ``scale``, of the value plus ``shift``.

    The result still has the shift: what reads it must take it away.
    """

    bits: int
    scale: float
    numerator: int
    denominator: int
    round_table: bool = False
    flush: bool = True
    shift: float = 0.0

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The scale: the same tensor each time, so that operators share it as a parameter."""
        return torch.tensor(self.scale, dtype=torch.float32)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x + shift`` quantized and dequantized."""
        shifted = x + self.shift if self.shift else x
        return log_quantize(
            shifted,
            self.tensor.to(x.dtype),
            bits=self.bits,
            numerator=self.numerator,
            denominator=self.denominator,
            round_table=self.round_table,
            flush=self.flush,
        )

    def emit(self, editor: Editor, source: fx.Node, name: str) -> fx.Node:
        """Call the quantizer on ``source``."""
        scale = editor.parameter(f"{name}.scale", self.tensor.to(value_of(source).dtype))
        shifted = editor.call(aten.add.Tensor, source, self.shift) if self.shift else source
        return editor.call(
            xf.log_quantize,
            shifted,
            scale,
            bits=self.bits,
            numerator=self.numerator,
            denominator=self.denominator,
            round_table=self.round_table,
            flush=self.flush,
        )


Quantizer: TypeAlias = Uniform | Dynamic | Logarithmic


@dataclass(frozen=True)
class Slot:
    """A place that a quantizer goes to: an operand of an operator, and the value that is there."""

    node: str
    operand: str
    value: str
    path: str


@dataclass(frozen=True)
class Layer:
    """A linear layer's new parameters; ``bias`` None leaves the bias as it is."""

    weight: PackedGroups
    bits: int
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """A quantizer for each slot (node, operand), and new parameters of each linear layer, by the name of its node."""

    quantizers: Mapping[tuple[str, str], Quantizer]
    layers: Mapping[str, Layer]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A program made ready by exact rewrites, and the quantizers that these settled, by the name of the value."""

    program: Program
    settled: Mapping[str, Uniform] = field(default_factory=dict)
    fired: tuple[Fired, ...] = ()
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True)
class LowBitPass(Pass):
    """A pass that stores weights in few bits and rounds activations.

    Attributes:
        weight_bits: Of a weight's code: 2, 3, 4, 6 or 8.
        activation_bits: Of an activation's code, 2 to 8; simulated.
        attention: Quantize the operands of both products of attention, too.
        skip: Shell patterns of module paths or weight names that stay in floating point.

    """

    weight_bits: int = 4
    activation_bits: int = 8
    attention: bool = True
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET

    def __post_init__(self) -> None:
        if self.weight_bits not in WIDTHS:
            raise ValueError(f"weight_bits must be 2, 3, 4, 6 or 8, but is {self.weight_bits}")
        if not 2 <= self.activation_bits <= 8:
            raise ValueError(f"activation_bits must lie in [2, 8], but is {self.activation_bits}")

    @abstractmethod
    def plan(self, prepared: Prepared, slots: Sequence[Slot], context: Context) -> Plan:
        """Choose every quantizer and quantize every weight."""

    def prepare(self, program: Program, context: Context) -> Prepared:
        """Rewrite the program without changing its function."""
        return Prepared(program)

    def run(self, program: Program, context: Context) -> PassResult:
        """Prepare the program, choose quantizers on calibration data, put them in."""
        refuse_repetition(program, _DONE, "operators")
        check_weights(program, [node for node in linear_layers(program) if not is_skipped(node, self.skip)])
        prepared = self.prepare(program, context)
        if self.attention:
            prepared = _split_attention(prepared, self.skip)
        slots = find_slots(prepared.program, self.skip)
        plan = self.plan(prepared, slots, context) if slots else Plan({}, {})
        done = rewrite(
            prepared.program, {self.name: lambda editor, node: _quantized(editor, node, plan, self.skip)}, sweeps=1
        )
        if not done.fired:
            return PassResult(program, False, (), (*prepared.rejected, *done.rejected))
        # layers that read one value have a quantizer each until here
        result = EliminateCommonSubexpressions().run(done.program, context).program
        result.level = Level.TARGET
        rejected = (*prepared.rejected, *done.rejected)
        return PassResult(result, True, (*prepared.fired, *done.fired), rejected, plan.notes)


def find_slots(program: Program, skip: Sequence[str]) -> list[Slot]:
    """Return the operands to quantize, in execution order."""
    linears = frozenset(linear_layers(program))
    slots = []
    for node in program.nodes():
        names = ("x",) if node in linears else _operands(node)
        if is_skipped(node, skip):
            continue
        for name in names:
            given = arguments(node)[name]
            slots.append(Slot(node.name, name, given.name, path_of(node) or node.name))
    return slots


def _operands(node: fx.Node) -> tuple[str, ...]:
    if is_call(node, xf.attention_weights):
        return ("q", "k")
    return ("weights", "v") if is_call(node, xf.attention_values) else ()


def nearest_rows(weight: torch.Tensor, bits: int) -> GroupCodes:
    """Round a matrix to the nearest codes, asymmetric, one scale and zero point per row."""
    return quantize_groups(weight, bits=bits, group=weight.shape[1], symmetric=False)


def refuse_constants(slots: Sequence[Slot], rows: Mapping[str, torch.Tensor]) -> None:
    """Raise DataError for a value that never differs: it has no range."""
    for slot in slots:
        low, high = float(rows[slot.value].min()), float(rows[slot.value].max())
        # a softmax over one key is always 1
        if low == high and slot.operand != "weights":
            raise DataError(
                f"On the calibration data, the input {slot.operand} of {slot.path} is always {low:g}, so it has no "
                f"range. Give calibration data that differ, or leave the layer out with skip."
            )


def _split_attention(prepared: Prepared, skip: Sequence[str]) -> Prepared:
    """Make two operators of attention, so that its weights are a value of the graph."""

    def split_attention(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        if not is_call(node, xf.attention):
            return None
        if is_skipped(node, skip):
            return Reject("it is named in skip")
        given = arguments(node)
        v = given.pop("v")
        heads = {name: given[name] for name in ("heads", "kv_heads")}
        operands = [given.pop(name) for name in ("q", "k", "key_mask", "bias", "key_log_size")]
        weights = editor.call(xf.attention_weights, *operands, **given)
        return editor.call(xf.attention_values, weights, v, **heads)

    done = rewrite(prepared.program, {"split-attention": split_attention}, sweeps=1)
    fired, rejected = (*prepared.fired, *done.fired), (*prepared.rejected, *done.rejected)
    return Prepared(done.program, prepared.settled, fired, rejected)


def _quantized(editor: Editor, node: fx.Node, plan: Plan, skip: Sequence[str]) -> fx.Node | Reject | None:
    """Return an operator with its quantizers in front, a linear layer with its weight in codes."""
    is_layer = is_call(node, xf.linear, xf.linear_activation)
    names = ("x",) if is_layer else _operands(node)
    if not names:
        return None
    if is_skipped(node, skip):
        return Reject("it is named in skip")
    if not is_layer:
        return _quantized_call(editor, node, plan, names)
    parts = linear_parts(editor, node)
    if isinstance(parts, Reject):
        return parts
    found = plan.layers[node.name]
    source = _emit(editor, operand(node), plan.quantizers[node.name, "x"])
    bias = arguments(node)["bias"] if found.bias is None else editor.parameter(parts.bias_name, found.bias)
    stored = found.weight.parameters(editor, parts.weight_name)
    operands = (source, *stored) if bias is None else (source, *stored, bias)
    product = editor.call(xf.weight_only_linear, *operands, bits=found.bits)
    if is_call(node, xf.linear):
        return product
    return editor.call(xf.activation, product, function=arguments(node)["function"])


def _quantized_call(editor: Editor, node: fx.Node, plan: Plan, names: Sequence[str]) -> fx.Node:
    given = arguments(node)
    changed = {name: _emit(editor, given[name], plan.quantizers[node.name, name]) for name in names}
    places = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    operands = [changed.get(name, value) for name, value in zip(places, node.args, strict=False)]
    keywords: dict[str, Any] = dict(node.kwargs)
    return editor.call(node.target, *operands, **keywords)


def _emit(editor: Editor, source: fx.Node, quantizer: Quantizer) -> fx.Node:
    return quantizer.emit(editor, source, source.name)
