"""Quantize state-space layers: projections, and what enters the scan (Quamba2; Quamba for Mamba-1).

    x of xf.ssd:              a fixed 8-bit scale for each group of heads and of channels, sorted by their maxima
    B and C of xf.ssd:        a fixed 8-bit scale for each state group
    x of xf.selective_scan:   one fixed 8-bit scale for the tensor, outliers clipped by percentile
    projections:              W8A8 (executed in int8), or W4A8 (weights stored in 4 bits, activations simulated)
    output projection:        W y = (W H^T) (H y), H a normalized Hadamard matrix, which spreads outliers over channels

H multiplies the activations as the program runs: as many multiplications as a layer of C x C, in blocks of the largest
power of two that divides C.  The groups are those that ``sort-state-channels`` makes contiguous.

**Approximate**; needs calibration data.  What enters the scan is rounded and stays in float: the scan itself is not
executed in integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, operand, readers, xf
from xformopt.observers import Range, affine_parameters, observe_ranges
from xformopt.passes.quantize.quantize_static import QuantizeStatic
from xformopt.passes.quantize.quantize_weights import QuantizeWeights
from xformopt.passes.quantize.support.quantized_layers import Replace, quantize_layers
from xformopt.passes.quantize.support.state_groups import group_channels
from xformopt.passes.quantize.support.state_space import SCANS, is_rotation, projections, scans
from xformopt.passes.weights import LinearParts, check_weights, is_skipped, linear_layers, linear_parts
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program, path_of, value_of
from xformopt.rewrite import Editor, Fired, Reject, Rewritten, rewrite

__all__ = ["QuantizeStateSpace", "hadamard"]


@dataclass(frozen=True)
class QuantizeStateSpace(Pass):
    """Quantize the projections of state-space layers and the inputs of their scans.

    Attributes:
        weight_bits: Of the projections' weights: 8 executes in integers, 4 is stored in few bits.
        head_groups: Groups of heads of Mamba-2 with scales of their own.
        channel_groups: Groups of channels in each group of heads.
        percentile: The share of values, in percent, within the range of Mamba-1's scan input.
        rotate: Whether the output projection is turned by a Hadamard matrix.
        group: Neighbouring input channels that share a scale, of weights of 4 bits.
        method: How weights of 4 bits are rounded: nearest, or gptq.
        skip: Shell patterns of module paths or weight names of projections that stay in floating point.

    """

    weight_bits: int = 8
    head_groups: int = 4
    channel_groups: int = 4
    percentile: float = 99.99
    rotate: bool = True
    group: int = 32
    method: Literal["nearest", "gptq"] = "nearest"
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = (
        "Chiang et al., Quamba2, arXiv 2503.22879, sections 4.2 and 4.3",
        "Chiang et al., Quamba, arXiv 2410.13229 (clipping and rotation for Mamba-1)",
    )

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise ValueError(f"weight_bits must be 4 or 8, but is {self.weight_bits}")
        if self.head_groups < 1 or self.channel_groups < 1:
            raise ValueError("head_groups and channel_groups must be at least 1")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (50, 100], but is {self.percentile}")
        QuantizeWeights(bits=4, group=self.group)

    def run(self, program: Program, context: Context) -> PassResult:
        """Turn the outputs, round what enters the scans, then quantize the projections."""
        found = [node for node in scans(program) if not is_call(operand(node), xf.fake_quantize)]
        layers = [node for node in projections(program) if node in set(linear_layers(program))] if found else []
        if not found:
            return PassResult(program, False, notes=("there is no state-space layer in float",))
        check_weights(program, layers)
        fired: tuple[Fired, ...] = ()
        if self.rotate:
            turned = self._turned(program, found)
            program, fired = turned.program, turned.fired
        result = self._projected(program, context)
        rounded = self._rounded_scans(program, result.program, context)
        rounded.program.level = Level.TARGET
        return PassResult(rounded.program, True, (*fired, *result.fired, *rounded.fired), result.rejected)

    def _turned(self, program: Program, found: Sequence[fx.Node]) -> Rewritten:
        outputs = {
            node.name
            for scan in found
            for node in projections(program)
            if not is_skipped(node, self.skip) and node in _readers_of_result(scan)
        }

        def turn_output(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if node.name not in outputs:
                return None
            parts = linear_parts(editor, node)
            if isinstance(parts, Reject):
                return parts
            matrix = hadamard(parts.weight.shape[1]).to(parts.weight.dtype)
            if len(matrix) == 1:
                return Reject("an odd number of channels cannot be turned")
            turned = editor.call(xf.linear, operand(node), editor.parameter(f"hadamard.{len(matrix)}", matrix))
            weight = (parts.weight.double() @ hadamard(len(matrix)).t()).to(parts.weight.dtype)
            return call_with(editor, node, x=turned, weight=editor.parameter(parts.weight_name, weight))

        return rewrite(program, {"turn-output": turn_output}, sweeps=1)

    def _projected(self, program: Program, context: Context) -> PassResult:
        """Quantize the projections; the rotations themselves stay in float."""
        known = set(linear_layers(program))
        layers = [
            node
            for node in projections(program)
            if node in known and not is_skipped(node, self.skip) and not is_rotation(node)
        ]
        chosen = {node.name for node in layers}
        others = {
            node.name: "it rotates what is quantized" if is_rotation(node) else "it belongs to no state-space layer"
            for node in known
            if node.name not in chosen
        }
        replace_layer = self._replacing(program, context, layers)
        return quantize_layers(program, replace_layer, self.skip, others)

    def _replacing(self, program: Program, context: Context, layers: Sequence[fx.Node]) -> Replace:
        if self.weight_bits == 8:
            return QuantizeStatic().replacing(program, context, layers)
        weights = QuantizeWeights(bits=4, group=self.group, method=self.method).replacing(program, context, layers)
        inputs = {node.name: operand(node).name for node in layers}
        ranges = observe_ranges(program, context.calibration, inputs.values(), progress=context.progress)

        def replace_layer(editor: Editor, parts: LinearParts, source: fx.Node) -> fx.Node | Reject:
            value = inputs[parts.node.name]
            scale, zero = affine_parameters(ranges[value])
            stored = (
                editor.parameter(f"{value}.scale", scale[0].clone()),
                editor.parameter(f"{value}.zero", zero[0].clone()),
            )
            return weights(editor, parts, editor.call(xf.fake_quantize, source, *stored, bits=8))

        return replace_layer

    def _rounded_scans(self, before: Program, program: Program, context: Context) -> Rewritten:
        """Round what enters each scan of ``program``, in ranges observed in ``before``."""
        names: dict[str, dict[str, str]] = {}
        for node in scans(before):
            roles = ("x", "b", "c") if is_call(node, xf.ssd) else ("x",)
            names[node.name] = {role: arguments(node)[role].name for role in roles}
        wide = [value for name, roles in names.items() if "b" in roles for value in roles.values()]
        clipped = [roles["x"] for roles in names.values() if "b" not in roles]
        ranges = observe_ranges(before, context.calibration, wide, granularity="channel") if wide else {}
        if clipped:
            ranges |= observe_ranges(
                before, context.calibration, clipped, method="percentile", percentile=self.percentile
            )

        def round_inputs(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
            if not is_call(node, *SCANS) or is_call(operand(node), xf.fake_quantize):
                return None
            given = arguments(node)
            changes = {}
            for role, value in names[node.name].items():
                scale = self._scale(role, given, ranges[value]).to(value_of(given[role]).dtype)
                stored = editor.parameter(f"{path_of(node) or node.name}.{role}.scale", scale)
                changes[role] = editor.call(xf.fake_quantize, given[role], stored, bits=8)
            return call_with(editor, node, **changes)

        return rewrite(program, {"round-scan": round_inputs}, sweeps=1)

    def _scale(self, role: str, given: Mapping[str, object], found: Range) -> torch.Tensor:
        """Return a symmetric scale: a scalar for Mamba-1, one number for each channel for Mamba-2."""
        largest = torch.maximum(found.low.abs(), found.high.abs())
        if "heads" not in given:
            return _positive(largest[0] / 127)
        if role == "x":
            return group_channels(
                largest,
                heads=int(str(given["heads"])),
                head_groups=self.head_groups,
                channel_groups=self.channel_groups,
            ).per_channel()
        per_group = largest.reshape(int(str(given["groups"])), -1)
        return _positive(per_group.amax(1, keepdim=True) / 127).expand_as(per_group).flatten().clone()


def hadamard(width: int) -> torch.Tensor:
    """Return a symmetric orthogonal matrix of ``+-n^-1/2``, float64, in blocks of the largest power of two in width."""
    size = width & -width
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < size:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.block_diag(*[block / size**0.5] * (width // size)) if size > 1 else torch.ones(1, 1).double()


def _readers_of_result(scan: fx.Node) -> set[fx.Node]:
    """Return the nodes behind a scan up to the linear layers that read its result."""
    found: set[fx.Node] = set()
    for reader in readers(scan):
        found.add(reader)
        if not is_call(reader, xf.linear, xf.linear_activation):
            found |= _readers_of_result(reader)
    return found


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
