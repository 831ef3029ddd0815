"""Move outlier channels from activations into weights, so that both are easier to quantize (SmoothQuant).

    norm(x; g, c) W^T + b    ->    norm(x; g / s, c / s) (W diag(s))^T + b,    s_j = max|X_j|^a / max|W_j|^(1 - a)

X is the norm's output on calibration data, W what its readers multiply it with (the largest entry over all of them).

**Exact**: the same function up to the rounding of the new parameters; needs calibration data.  Run it after the passes
that fold and fuse norms, and before one that quantizes linear layers.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, is_returned, operand, readers, xf
from xformopt.observers import Range, observe_ranges
from xformopt.passes.weights import LinearParts, linear_parts, shared_parameter
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program, path_of, value_of
from xformopt.program.text import target_name
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["SmoothOutliers"]

_LINEAR = (xf.linear, xf.linear_activation)
_NORMS = (xf.layer_norm, xf.rms_norm)
_SUM_NORMS = (xf.add_layer_norm, xf.add_rms_norm)
# factors this close to 1 change nothing that quantization sees
_BALANCED = 1e-3
_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothOutliers(RewritePass):
    """Scale channels between norms and the linear layers behind them, so that both are easy to quantize.

    Attributes:
        alpha: How much of the range moves into the weights: 0 nothing of the activations', 1 all of it.

    """

    alpha: float = 0.5

    sources: ClassVar[tuple[str, ...]] = ("Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], but is {self.alpha}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Calibrate every norm's output; return the one rule, which fires at the norm."""
        wanted = [value.name for node in program.nodes() if (value := _output(node)) is not None]
        ranges = (
            observe_ranges(program, context.calibration, wanted, granularity="channel", progress=context.progress)
            if wanted
            else {}
        )

        def smooth_outliers(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
            value = _output(node)
            if value is None or value.name not in ranges:
                return None
            linears = _linear_readers(editor, value)
            if isinstance(linears, Reject):
                return linears
            if refusal := _refuse_norm(editor, node):
                return refusal
            scale = self._scale(ranges[value.name], [parts.weight for parts in linears])
            if bool(((scale - 1).abs() < _BALANCED).all()):
                return Reject("activations and weights are balanced already")
            smoothed, replaced = _smooth_norm(editor, node, scale)
            for parts in linears:
                weight = editor.parameter(parts.weight_name, (parts.weight.double() * scale).to(parts.weight.dtype))
                replaced[parts.node] = call_with(editor, parts.node, x=smoothed, weight=weight)
                replaced[parts.node].meta["path"] = path_of(parts.node)
            return replaced

        return (smooth_outliers,)

    def _scale(self, found: Range, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return s in float64, 1 for channels without activations or weights."""
        activations = torch.maximum(found.low.abs(), found.high.abs())
        columns = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
        scale = activations**self.alpha / columns ** (1 - self.alpha)
        return torch.where((activations > _SMALLEST) & (columns > _SMALLEST), scale, torch.ones_like(scale))


def _output(node: fx.Node) -> fx.Node | None:
    """Return the normalized value of a norm, or None for anything else."""
    if is_call(node, *_NORMS):
        return node
    if is_call(node, *_SUM_NORMS):
        return next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    return None


def _linear_readers(editor: Editor, value: fx.Node) -> list[LinearParts] | Reject:
    """Return the linear layers that read ``value``, if they are all that do and can be changed."""
    if is_returned(value):
        return Reject("the program returns the norm")
    found: list[LinearParts] = []
    for reader in readers(value):
        if not is_call(reader, *_LINEAR) or operand(reader) is not value:
            return Reject(f"{target_name(reader.target)} reads the norm and is no linear layer")
        parts = linear_parts(editor, reader)
        if isinstance(parts, Reject):
            return parts
        if refusal := shared_parameter(parts):
            return refusal
        found.append(parts)
    return found or Reject("nothing reads the norm")


def _refuse_norm(editor: Editor, node: fx.Node) -> Reject | None:
    given = arguments(node)
    if given.get("groups", 1) != 1:
        return Reject("the norm is over groups of channels")
    if any(given.get(name) is not None and editor.constant(given[name]) is None for name in ("weight", "bias")):
        return Reject("the norm's weight or bias is computed")
    return None


def _smooth_norm(editor: Editor, node: fx.Node, scale: torch.Tensor) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """Return the norm's output divided by ``scale``, and what replaces its other outputs."""
    given, dtype = arguments(node), value_of(operand(node)).dtype
    weight, bias = editor.constant(given["weight"]), editor.constant(given.get("bias"))
    stem = path_of(node) or node.name
    divided = (1 / scale if weight is None else weight.double() / scale).to(dtype)
    name = f"{stem}.weight" if weight is None else str(given["weight"].target)
    operands = [given[name] for name in ("x", "residual") if name in given]
    operands.append(editor.parameter(name, divided))
    if bias is not None:
        operands.append(editor.parameter(str(given["bias"].target), (bias.double() / scale).to(dtype)))
    smoothed = editor.call(node.target, *operands, eps=given["eps"])
    if is_call(node, *_NORMS):
        return smoothed, {}
    others = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    replaced = {other: editor.call(operator.getitem, smoothed, 1) for other in others}
    return editor.call(operator.getitem, smoothed, 0), replaced
