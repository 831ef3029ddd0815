"""What passes that quantize linear layers share: which layers, which of them stay in float, and what is refused."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx

from xformopt.errors import DataError, PassError
from xformopt.kernels.definition import find_operator
from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.weights import LinearParts, check_weights, is_skipped, linear_layers, linear_parts
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.pipeline.numeric import relative_l2, run_region
from xformopt.program import Level, Program, interpret, valid_positions, value_of
from xformopt.rewrite import Editor, Fired, Reject, rewrite

__all__ = [
    "QuantizeLinears",
    "Replace",
    "drift_between",
    "measured_batches",
    "quantize_layers",
    "refuse_repetition",
]

_QUANTIZED = frozenset(
    {"float8_linear", "float_weight_linear", "quantized_linear", "shift_linear", "ternary_linear", "weight_only_linear"}
)

# returns the quantized layer without its activation, or why there is none
Replace: TypeAlias = Callable[[Editor, LinearParts, fx.Node], "fx.Node | Reject"]
_Batch: TypeAlias = Mapping[str, torch.Tensor]


def refuse_repetition(program: Program, operators: Collection[str], what: str) -> None:
    """Raise PassError when nothing is left to quantize because it was done before."""
    done = sum(
        1 for node in program.nodes() if (found := find_operator(node.target)) is not None and found.name in operators
    )
    if done:
        raise PassError(
            f"The program {program.name!r} is already quantized: {done} {what} are, and none is left in floating "
            f"point. Quantize the original program with the settings that you want."
        )


def quantize_layers(
    program: Program, replace_layer: Replace, skip: Sequence[str], kept: Mapping[str, str]
) -> PassResult:
    """Replace linear layers but those in ``skip``, and those in ``kept``, which gives the reasons by node name."""

    def quantize_linear(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        if not is_call(node, xf.linear, xf.linear_activation):
            return None
        if is_skipped(node, skip):
            return Reject("it is named in skip")
        if node.name in kept:
            return Reject(kept[node.name])
        if value_of(node).dtype == torch.float64:
            return Reject("no runtime quantizes float64: run convert-precision{to=fp32} before this pass")
        parts = linear_parts(editor, node)
        if isinstance(parts, Reject):
            return parts
        product = replace_layer(editor, parts, operand(node))
        if isinstance(product, Reject) or is_call(node, xf.linear):
            return product
        return editor.call(xf.activation, product, function=arguments(node)["function"])

    done = rewrite(program, {"quantize-linear": quantize_linear}, sweeps=1)
    if not done.fired:
        return PassResult(program, False, (), done.rejected)
    done.program.level = Level.TARGET
    return PassResult(done.program, True, done.fired, done.rejected)


@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """A pass that replaces linear layers by quantized ones.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        max_drift: Relative L2 of the outputs up to which layers are quantized; those whose own output suffers most stay
            in floating point.  None: all layers are quantized.

    """

    skip: tuple[str, ...] = ()
    max_drift: float | None = None

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET

    @abstractmethod
    def replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        """Look at what the quantizer needs to know and return what quantizes one layer."""

    def prepare(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> tuple[Replace, tuple[str, ...]]:
        """Return what :meth:`replacing` does, and what is to be noted of how it was found."""
        return self.replacing(program, context, layers), ()

    def quantize(self, program: Program, replace_layer: Replace, kept: Mapping[str, str]) -> PassResult:
        """Quantize all layers but those in ``kept``, which gives the reasons by node name."""
        return quantize_layers(program, replace_layer, self.skip, kept)

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every layer, then take back the most sensitive ones until the drift is within its limit."""
        layers = [node for node in linear_layers(program) if not is_skipped(node, self.skip)]
        if not linear_layers(program):
            refuse_repetition(program, _QUANTIZED, "linear layers")
        check_weights(program, layers)
        replace_layer, notes = self.prepare(program, context, layers)
        result = self.quantize(program, replace_layer, {})
        if self.max_drift is not None and result.changed:
            result = self._within(self.max_drift, program, context, replace_layer, result)
        return replace(result, notes=(*notes, *result.notes))

    def _within(
        self, limit: float, program: Program, context: Context, replace_layer: Replace, result: PassResult
    ) -> PassResult:
        batches = measured_batches(program, context)
        wanted = [interpret(program, batch) for batch in batches]
        drift = drift_between(program, batches, wanted, result.program)
        if drift <= limit:
            return replace(result, notes=(f"all {len(result.fired)} layers quantized: drift {drift:.2e}",))
        errors = _layer_errors(program, batches[0], result.fired)
        order = sorted(errors, key=lambda name: -errors[name])
        # the drift falls, on the whole, with every layer that is taken back: bisect their number
        too_few, enough, best = 0, len(order), PassResult(program, False)
        while enough - too_few > 1:
            count = (too_few + enough) // 2
            context.progress("finding sensitive layers", count, len(order))
            tried = self.quantize(program, replace_layer, _reasons(order[:count], errors))
            found = drift_between(program, batches, wanted, tried.program)
            if found <= limit:
                enough, best, drift = count, tried, found
            else:
                too_few = count
        if not best.changed:
            best = self.quantize(program, replace_layer, _reasons(order, errors))
            return replace(best, notes=(f"no layer can be quantized with a drift of at most {limit:.2e}",))
        note = f"{enough} of {len(order)} layers kept in floating point, the most sensitive ones: drift {drift:.2e}"
        return replace(best, notes=(note,))


def _reasons(kept: Sequence[str], errors: Mapping[str, float]) -> dict[str, str]:
    return {name: f"it is sensitive: quantized, its output is off by {errors[name]:.1e}" for name in kept}


def measured_batches(program: Program, context: Context) -> list[_Batch]:
    """Return the batches on which drift is measured: two of calibration at most, or the example."""
    if context.calibration:
        return list(context.calibration[:2])
    if program.example_inputs:
        return [program.example_inputs]
    raise DataError(
        "The option max_drift measures layers on calibration data, and there is none, nor has the program example "
        "inputs. Give some with --calibration (or calibration=... in Python)."
    )


def drift_between(
    program: Program, batches: Sequence[_Batch], wanted: Sequence[Mapping[str, torch.Tensor]], changed: Program
) -> float:
    """Return how far the outputs of ``changed`` are from ``wanted``, those of ``program``: the worst relative L2."""
    values = {spec.name: value_of(node) for spec, node in zip(program.outputs, program.results, strict=True)}
    worst = 0.0
    for batch, reference in zip(batches, wanted, strict=True):
        found = interpret(changed, batch)
        for name, fake in values.items():
            valid = valid_positions(program, fake, batch)
            worst = max(worst, relative_l2(reference[name], found[name], valid))
    return worst


@dataclass
class _LayerErrors:
    """Runs each quantized layer on the values that reach the original one."""

    fired: Mapping[str, Fired]
    # a layer behind a quantized one reads what replaced it: what that was called before
    original: Mapping[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def observe(self, node: fx.Node, value: Any) -> None:
        if (fired := self.fired.get(node.name)) is not None:
            given = {name: self.values[self.original.get(name, name)] for name in fired.after.inputs}
            found = run_region(fired.after, given)
            self.errors[node.name] = relative_l2(value, found[fired.after.outputs[0]])
        if any(user.name in self.fired for user in node.users):
            self.values[node.name] = value
        for read in node.all_input_nodes:
            if all(user.name in self.errors for user in read.users if user.name in self.fired):
                self.values.pop(read.name, None)


def _layer_errors(program: Program, batch: _Batch, fired: Sequence[Fired]) -> dict[str, float]:
    """Return how far each layer's output is off when it alone is quantized."""
    names = {rewritten.after.outputs[0]: rewritten.before.outputs[0] for rewritten in fired}
    found = _LayerErrors({rewritten.before.outputs[0]: rewritten for rewritten in fired}, names)
    interpret(program, batch, observe=found.observe)
    return found.errors
