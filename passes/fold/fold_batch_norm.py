"""Fold batch normalization into the convolution or linear layer that it reads.

    ((W * x + b) - mean) / sqrt(var + eps) * g + c    ->    (W s) * x + ((b - mean) s + c),   s = g / sqrt(var + eps)

**Exact** up to the rounding of the new parameters, which are computed in float64.  An activation between the two stops
it.  Works at every level.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, is_returned, xf
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Level, Program, value_of
from xformopt.program.text import target_name
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldBatchNorm"]

aten = torch.ops.aten

_CONVOLUTIONS = frozenset(
    {
        aten.convolution.default,
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
    }
)
_TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
_LINEARS = frozenset({aten.linear.default, xf.linear})
_ACTIVATIONS = frozenset(
    {
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.hardtanh.default,
        aten.hardswish.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.clamp.default,
        xf.activation,
    }
)


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Move batch normalization into the parameters of the layer before it."""

    takes: ClassVar[Level] = Level.CAPTURED
    leaves: ClassVar[Level] = Level.CAPTURED
    sources: ClassVar[tuple[str, ...]] = ("Ioffe and Szegedy, arXiv 1502.03167", "Jacob et al., arXiv 1712.05877")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the normalized value."""
        return (_fold_batch_norm,)


@dataclass(frozen=True)
class _Affine:
    """Batch normalization with fixed statistics: ``x * scale + shift`` per channel, in float64."""

    scale: torch.Tensor
    shift: torch.Tensor


def _fold_batch_norm(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    norm = _find_norm(node)
    if norm is None:
        return None
    given = arguments(norm)
    if given.get("training"):
        return Reject("the batch norm uses the statistics of the batch: the model was captured in training mode")
    affine = _affine(editor, given)
    if isinstance(affine, Reject):
        return affine
    layer = given["input"]
    if refusal := _refusal(editor, layer):
        return refusal
    return _absorb(editor, layer, affine)


def _find_norm(node: fx.Node) -> fx.Node | None:
    """Return the batch norm whose normalized value ``node`` is."""
    if is_call(node, aten.batch_norm.default):
        return node
    if node.target is operator.getitem and node.args[1] == 0:
        whole = node.args[0]
        return whole if is_call(whole, aten._native_batch_norm_legit_no_training.default) else None
    return None


def _affine(editor: Editor, given: dict[str, Any]) -> _Affine | Reject:
    names = ("weight", "bias", "running_mean", "running_var")
    constants = {name: editor.constant(given[name]) for name in names}
    for name in names:
        # weight and bias may be absent, statistics may not
        if constants[name] is None and (given[name] is not None or name.startswith("running")):
            return Reject(f"the batch norm's {name} is no parameter")
    mean, variance = (constants[name].double() for name in names[2:])  # type: ignore[union-attr]
    scale = torch.rsqrt(variance + given["eps"])
    if constants["weight"] is not None:
        scale = scale * constants["weight"].double()
    shift = -mean * scale
    return _Affine(scale, shift if constants["bias"] is None else shift + constants["bias"].double())


def _refusal(editor: Editor, layer: fx.Node) -> Reject | None:
    if layer.target in _ACTIVATIONS:
        return Reject(f"an activation ({target_name(layer.target)}) stands between the layer and its batch norm")
    if layer.target not in _CONVOLUTIONS | _TRANSPOSED | _LINEARS:
        what = target_name(layer.target) if layer.op == "call_function" else f"the input {layer.target}"
        return Reject(f"the batch norm reads {what}, which is no convolution and no linear layer")
    if layer.target in _LINEARS and value_of(layer).dim() != 2:
        return Reject("the batch norm is over tokens, not over the channels of the linear layer")
    if len(layer.users) > 1 or is_returned(layer):
        return Reject(f"%{layer.name} has other readers")
    weight, bias = (arguments(layer)[name] for name in ("weight", "bias"))
    if editor.constant(weight) is None or (bias is not None and editor.constant(bias) is None):
        return Reject(f"the weight or bias of %{layer.name} is computed, not a parameter")
    if len(weight.users) > 1:
        return Reject(f"the weight {weight.target} has {len(weight.users)} readers and would be stored twice")
    return None


def _absorb(editor: Editor, layer: fx.Node, affine: _Affine) -> fx.Node:
    given = arguments(layer)
    weight, bias = editor.constant(given["weight"]), editor.constant(given["bias"])
    assert weight is not None
    scaled = _scale_channels(weight.double(), affine.scale, _is_transposed(layer), given.get("groups", 1))
    shifted = affine.shift if bias is None else affine.shift + bias.double() * affine.scale
    name = str(given["weight"].target)
    bias_name = name.removesuffix("weight") + "bias" if bias is None else str(given["bias"].target)
    changed = {
        "weight": editor.parameter(name, scaled.to(weight.dtype).contiguous()),
        "bias": editor.parameter(bias_name, shifted.to(weight.dtype)),
    }
    return editor.call(layer.target, *(given | changed).values())


def _is_transposed(layer: fx.Node) -> bool:
    return layer.target in _TRANSPOSED or bool(arguments(layer).get("transposed"))


def _scale_channels(weight: torch.Tensor, scale: torch.Tensor, transposed: bool, groups: int) -> torch.Tensor:
    """Scale the output channels: the first axis, or of a transposed convolution the second within each group."""
    if not transposed:
        return weight * scale.view(-1, *[1] * (weight.dim() - 1))
    parts = weight.reshape(groups, -1, *weight.shape[1:])  # [G, I / G, O / G, ...]
    return (parts * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
