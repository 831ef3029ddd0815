"""Quantize linear layers to few bits by reconstruction that is weighted by what matters to the class scores (APHQ-ViT).

1. Importance: the average perturbation Hessian H of each block's output
   (:mod:`xformopt.passes.quantize.support.perturbation`); by channel alone where calibration data has several lengths.
2. Every GELU between two linear layers becomes a ReLU, and both layers are trained anew to do what they did
   (:mod:`xformopt.passes.quantize.support.relu_mlps`): its non-negative values suit uniform quantizers.
3. Uniform quantizers everywhere: one scale per row of a weight, one range per value that linear layers and attention
   read.  Block by block, min mean(H (O^ - O)^2) over the rounding of weights and the scales of activations, with half
   of the elements left unquantized at random in each step (QDrop).

Wu et al., CVPR 2025, arXiv 2504.02508; they take 20,000 steps per block on 1,024 images.  Attention's probabilities are
inside one operator here and stay in float.

**Tuned**: takes gradient steps on calibration data.  Run it after the passes that look for linear layers, but before
those that fuse bias and activation or additions and norms.  With activations of 8 bits, layers execute in 8-bit
integers; with fewer, weights of 4 bits are stored packed, and activations are simulated in float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx

from xformopt.errors import DataError, PassError
from xformopt.kernels.packing import WIDTHS
from xformopt.match import arguments, is_call, operand, xf
from xformopt.observers import affine_parameters, observe_ranges
from xformopt.passes.quantize.support.perturbation import perturbation_hessian
from xformopt.passes.quantize.support.quantization import GroupCodes
from xformopt.passes.quantize.support.quantized_layers import refuse_repetition
from xformopt.passes.quantize.support.relu_mlps import Mlp, find_mlps, reconstruct_mlps
from xformopt.passes.quantize.support.uniform_grids import UniformGrid, fit_grid, weights_of
from xformopt.passes.weights import LinearParts, bias_operand, check_weights, is_skipped, linear_layers, linear_parts
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program, value_of
from xformopt.reconstruction import Block, Make, Positive, Reconstruction, Settings, cut_blocks, reconstruct
from xformopt.rewrite import Editor, Reject, rewrite

__all__ = ["Aphq"]

# scale and zero point of a value
Range: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_SIMULATED_BITS = (2, 3, 4, 5, 6)
_SCORES = "logits"


@dataclass(frozen=True)
class Aphq(Pass):
    """Quantize weights and activations by importance-weighted block reconstruction, after making MLPs easy to quantize.

    Attributes:
        skip: Shell patterns of module paths or weight names that stay in floating point.
        bits: Of a weight: 2, 3, 4, 6 or 8.
        activation_bits: Of an activation, 2 to 6 or 8.
        attention: Whether queries, keys and values are quantized, too (simulated).
        relu: Whether MLPs are reconstructed with ReLU.
        scores: The output that holds class scores.
        drop: The chance of an element to be left unquantized in a training step.
        iterations: Training steps of each block, at most; MLPs take as many.
        minutes: What training may take in all; steps are reduced to what fits.  What comes before training is not
            counted.  None: no limit.

    """

    skip: tuple[str, ...] = ()
    bits: int = 4
    activation_bits: int = 4
    attention: bool = True
    relu: bool = True
    scores: str = _SCORES
    drop: float = 0.5
    iterations: int = 400
    minutes: float | None = 10.0

    effect: ClassVar[Effect] = "tuned"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = (
        "Wu et al., APHQ-ViT, CVPR 2025, arXiv 2504.02508",
        "Wei et al., QDrop, arXiv 2203.05740",
        "Nagel et al., Up or Down? Adaptive Rounding, arXiv 2004.10568",
    )

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, but is {self.bits}")
        if self.activation_bits not in (*_SIMULATED_BITS, 8):
            raise ValueError(f"activation_bits must be 2 to 6 or 8, but is {self.activation_bits}")
        self._settings(1.0, drop=self.drop)

    def run(self, program: Program, context: Context) -> PassResult:
        """Find what matters, reconstruct the MLPs, then train the quantizers block by block."""
        layers = [node for node in linear_layers(program) if self._reason(node) is None]
        if not linear_layers(program):
            refuse_repetition(program, {"quantized_linear", "weight_only_linear"}, "linear layers")
        if not layers:
            return self._quantized(program, _Quantizers())
        check_weights(program, layers)
        scores = self._scores(program)
        if not context.calibration:
            raise DataError(
                "Quantizers are trained on calibration data, and there is none. Give some with --calibration (or "
                "calibration=... in Python)."
            )
        blocks = cut_blocks(program)
        importance = perturbation_hessian(program, context.calibration, blocks, scores, context.progress)
        notes: list[str] = []
        changed, mlps = program, find_mlps(program) if self.relu else []
        if mlps:
            changed, found = self._with_relu(program, context, mlps, blocks, importance)
            notes.append(f"{len(mlps)} GELU became ReLU; {found.summary()}")
        quantizers, found = self._trained(program, changed, context, blocks, importance)
        result = self._quantized(changed, quantizers)
        return replace(result, notes=(*notes, found.summary()))

    def _settings(self, share: float, **options: Any) -> Settings:
        minutes = None if self.minutes is None else self.minutes * share
        return Settings(iterations=self.iterations, minutes=minutes, **options)

    def _scores(self, program: Program) -> str:
        for spec, node in zip(program.outputs, program.results, strict=True):
            if spec.name == self.scores:
                return node.name
        raise PassError(
            f"Importance is measured on class scores, and the program {program.name!r} has no output named "
            f"{self.scores!r}; it has {', '.join(program.output_names)}. Name the one that holds them with scores=..., "
            f"or take adaround for a model without class scores."
        )

    def _with_relu(
        self,
        program: Program,
        context: Context,
        mlps: Sequence[Mlp],
        blocks: Sequence[Block],
        importance: Mapping[str, torch.Tensor],
    ) -> tuple[Program, Reconstruction]:
        home = {name: block for block in blocks for name in block.nodes}
        weights = {
            mlp.result: importance[name]
            for mlp in mlps
            for name in home[mlp.result].outputs
            if name in importance and importance[name].shape[-1] == _width(program, mlp.result)
        }
        settings = self._settings(0.5, seed=context.seed)
        return reconstruct_mlps(program, context, mlps, weights, settings, (self.name, asdict(self)))

    def _trained(
        self,
        original: Program,
        program: Program,
        context: Context,
        blocks: Sequence[Block],
        importance: Mapping[str, torch.Tensor],
    ) -> tuple[_Quantizers, Reconstruction]:
        """Train the quantizers of all layers of ``program`` towards the blocks of ``original``."""
        layers = [node for node in linear_layers(program) if self._reason(node) is None]
        grids = {name: self._grid(program.parameters[name]) for name in weights_of(layers, lambda _: True)}
        ranges = self._ranges(program, context, layers)
        changed = _with_quantizers(program, ranges, {node.name for node in layers}, self.activation_bits)
        variables: dict[str, Make] = {
            **{name: partial(grid.variable, program.parameters[name]) for name, grid in grids.items()},
            **{_scale_name(name): partial(Positive, scale) for name, (scale, _) in ranges.items()},
        }
        found = reconstruct(
            original,
            changed,
            context.calibration,
            variables,
            self._settings(0.5 if self.relu else 1.0, drop=self.drop, seed=context.seed),
            describes=(self.name, asdict(self)),
            blocks=blocks,
            weights=importance,
            progress=context.progress,
        )
        codes = {name: grid.codes(program.parameters[name], found.results[name]) for name, grid in grids.items()}
        trained = {name: (found.results[_scale_name(name)], zero) for name, (_, zero) in ranges.items()}
        return _Quantizers(codes, trained), found

    def _ranges(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> dict[str, Range]:
        """Return scale and zero point of every value to quantize."""
        values = dict.fromkeys(operand(node).name for node in layers)
        if self.attention:
            values |= dict.fromkeys(name for node in program.nodes() for name in _attended(node))
        bits = self.activation_bits
        seen = observe_ranges(program, context.calibration, values, method="mse", bits=bits, progress=context.progress)
        found = {name: affine_parameters(range_, bits) for name, range_ in seen.items()}
        return {name: (scale[0].clone(), zero[0].clone()) for name, (scale, zero) in found.items()}

    def _grid(self, weight: torch.Tensor) -> UniformGrid:
        # integer execution takes weights that are symmetric around zero
        return fit_grid(weight, bits=self.bits, group=weight.shape[1], symmetric=self.activation_bits == 8, search=True)

    def _reason(self, node: fx.Node) -> str | None:
        """Return why a layer stays in floating point, or None."""
        if is_skipped(node, self.skip):
            return "it is named in skip"
        weight = operand(node, 1)
        if len(weight.users) > 1:
            return f"its weight has {len(weight.users)} readers"
        columns = value_of(weight).shape[1]
        if columns * self.bits % 8:
            return f"rows of {columns} codes of {self.bits} bits do not fill whole bytes"
        return None

    def _quantized(self, program: Program, quantizers: _Quantizers) -> PassResult:
        """Put the quantized layers in place."""

        def quantize_linear(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, xf.linear, xf.linear_activation):
                return None
            parts = linear_parts(editor, node)
            if isinstance(parts, Reject):
                return parts
            if (reason := self._reason(node)) is not None:
                return Reject(reason)
            product = self._layer(editor, parts, quantizers.codes[parts.weight_name])
            if is_call(node, xf.linear):
                return product
            return editor.call(xf.activation, product, function=arguments(node)["function"])

        layers = {node.name for node in linear_layers(program) if self._reason(node) is None}
        with_activations = _with_quantizers(program, quantizers.ranges, layers, self.activation_bits)
        done = rewrite(with_activations, {"quantize-linear": quantize_linear}, sweeps=1)
        if not done.fired:
            return PassResult(program, False, (), done.rejected)
        done.program.level = Level.TARGET
        return PassResult(done.program, True, done.fired, done.rejected)

    def _layer(self, editor: Editor, parts: LinearParts, codes: GroupCodes) -> fx.Node:
        name, rounded, bias = parts.weight_name, operand(parts.node), bias_operand(parts)
        if self.activation_bits != 8:
            stored = codes.packed().parameters(editor, name)
            return editor.call(xf.weight_only_linear, rounded, *stored, *bias, bits=self.bits)
        signed = (codes.codes.to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
        weight = editor.parameter(f"{name}.codes", signed)
        step = editor.parameter(f"{name}.scale", codes.scale[:, 0].contiguous())
        # the quantizer before the layer becomes part of it
        source, scale, zero = rounded.args[:3]
        return editor.call(xf.quantized_linear, source, weight, step, *(bias or (None,)), scale, zero)


@dataclass(frozen=True)
class _Quantizers:
    """Trained codes by the names of weights, and ranges by the names of values."""

    codes: Mapping[str, GroupCodes] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)


def _with_quantizers(program: Program, ranges: Mapping[str, Range], layers: Collection[str], bits: int) -> Program:
    """Return the program with simulated quantizers before layers and attention; other values keep their names."""
    changed = program.copy()
    editor = Editor(changed)
    for node in list(changed.nodes()):
        places = range(3) if _attended(node) else range(1) if node.name in layers else ()
        for place in places:
            value = node.args[place]
            if isinstance(value, fx.Node) and value.name in ranges:
                node.update_arg(place, _rounded(editor.at(node), value, ranges[value.name], bits))
    return changed


def _rounded(editor: Editor, value: fx.Node, found: Range, bits: int) -> fx.Node:
    """Return a value in its quantizer; once for all of its readers."""
    for user in value.users:
        if is_call(user, xf.fake_quantize):
            return user
    scale = editor.parameter(_scale_name(value.name), found[0])
    zero = editor.parameter(f"{value.name}.zero", found[1])
    return editor.call(xf.fake_quantize, value, scale, zero, bits=bits)


def _attended(node: fx.Node) -> tuple[str, ...]:
    """Return the names of queries, keys and values of an attention operator."""
    if not is_call(node, xf.attention):
        return ()
    return tuple(value.name for value in node.args[:3] if isinstance(value, fx.Node))


def _scale_name(value: str) -> str:
    return f"{value}.scale"


def _width(program: Program, name: str) -> int:
    return int(next(value_of(node) for node in program.nodes() if node.name == name).shape[-1])
