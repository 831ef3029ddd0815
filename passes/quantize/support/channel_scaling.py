"""Moving a scale and a shift per channel into linear layers, from the norm that they read or by a multiplication.

norm(x; g, c) W^T + b    ->    norm(x; g / s, (c + t) / s) (W diag(s))^T + b - W t
x W^T + b                ->    (x * 1/s) (W diag(s))^T + b
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from xformopt.match import arguments, is_call, is_returned, operand, readers, xf
from xformopt.passes.weights import LinearParts, linear_parts, shared_parameter
from xformopt.program import Program, path_of, value_of
from xformopt.program.text import target_name
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["ChannelAffine", "ChooseScale", "linear_inputs", "multiplying_rule", "norm_outputs", "scaling_rule"]

aten = torch.ops.aten

_LINEAR = (xf.linear, xf.linear_activation)
_NORMS = (xf.layer_norm, xf.rms_norm)
_SUM_NORMS = (xf.add_layer_norm, xf.add_rms_norm)
# factors this close to 1 change nothing that quantization sees
_BALANCED = 1e-3


@dataclass(frozen=True)
class ChannelAffine:
    """What becomes of a norm's output, float64 ``[C]`` each: ``(x + shift) / scale``; no shift where it is None."""

    scale: torch.Tensor
    shift: torch.Tensor | None = None


# from the name of a norm's output and the weights that read it: s in float64 (with t, if any), or why there is none
ChooseScale: TypeAlias = Callable[[str, Sequence[torch.Tensor]], "torch.Tensor | ChannelAffine | Reject"]


def norm_outputs(program: Program) -> list[str]:
    """Return the names of the normalized values of all norms, in execution order."""
    return [value.name for node in program.nodes() if (value := _output(node)) is not None]


def scaling_rule(wanted: Sequence[str], choose: ChooseScale, *, restore: bool = False) -> Rule:
    """Return a rule that fires at norms whose output is in ``wanted``.

    Args:
        wanted: Names of outputs of norms.
        choose: Called with such a name and the weights of the linear layers behind.
        restore: What to do where something else reads the norm, too, such as the residual of a model that normalizes
            behind its blocks: give it the original value, by an explicit product per channel; or refuse.

    """
    known = frozenset(wanted)

    def scale_channels(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
        value = _output(node)
        if value is None or value.name not in known:
            return None
        linears = _linear_readers(editor, value, restore)
        if isinstance(linears, Reject):
            return linears
        if refusal := _refuse_norm(editor, node):
            return refusal
        chosen = choose(value.name, [parts.weight for parts in linears])
        if isinstance(chosen, Reject):
            return chosen
        if isinstance(chosen, torch.Tensor):
            if bool(((chosen - 1).abs() < _BALANCED).all()):
                return Reject("activations and weights are balanced already")
            chosen = ChannelAffine(chosen)
        changed, replaced = _changed_norm(editor, node, chosen)
        for parts in linears:
            replaced[parts.node] = _changed_linear(editor, parts, changed, chosen)
        if is_returned(value) or len(readers(value)) > len(linears):
            replaced[value] = _restored(editor, node, changed, chosen)
        return replaced

    return scale_channels


def linear_inputs(program: Program) -> dict[str, str]:
    """Return the name of the value that each linear layer reads, by the name of its weight, in execution order."""
    layers = [node for node in program.nodes() if is_call(node, *_LINEAR)]
    return {str(operand(node, 1).target): operand(node).name for node in layers}


def multiplying_rule(
    wanted: Mapping[str, str], choose: Callable[[str, Sequence[torch.Tensor]], torch.Tensor | Reject]
) -> Rule:
    """Return a rule that fires at the first linear layer that reads a value, and multiplies the value.

    ``wanted`` comes from :func:`linear_inputs`: a value that another rewrite has replaced has a new name by then, but
    its reader still has its weight.
    """

    def multiply_channels(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
        if not is_call(node, *_LINEAR) or str(operand(node, 1).target) not in wanted:
            return None
        source = operand(node)
        siblings = [reader for reader in readers(source) if is_call(reader, *_LINEAR) and operand(reader) is source]
        if siblings[0] is not node:
            return None
        linears: list[LinearParts] = []
        for reader in siblings:
            parts = linear_parts(editor, reader)
            if isinstance(parts, Reject):
                return parts
            if refusal := shared_parameter(parts):
                return refusal
            linears.append(parts)
        scale = choose(wanted[str(operand(node, 1).target)], [parts.weight for parts in linears])
        if isinstance(scale, Reject):
            return scale
        inverse = (1 / scale).to(value_of(source).dtype)
        factor = editor.parameter(f"{linears[0].weight_name.removesuffix('.weight')}.factor", inverse)
        scaled = editor.call(aten.mul.Tensor, source, factor)
        scaled.meta["path"] = path_of(node)
        return {parts.node: _changed_linear(editor, parts, scaled, ChannelAffine(scale)) for parts in linears}

    return multiply_channels


def _changed_linear(editor: Editor, parts: LinearParts, source: fx.Node, chosen: ChannelAffine) -> fx.Node:
    """Return the linear layer on the changed value."""
    dtype, bias = parts.weight.dtype, arguments(parts.node)["bias"]
    weight = editor.parameter(parts.weight_name, (parts.weight.double() * chosen.scale).to(dtype))
    if chosen.shift is not None:
        before = 0 if parts.bias is None else parts.bias.double()
        bias = editor.parameter(parts.bias_name, (before - parts.weight.double() @ chosen.shift).to(dtype))
    operands = (source, weight) if bias is None else (source, weight, bias)
    keywords: dict[str, Any] = dict(parts.node.kwargs)
    replaced = editor.call(parts.node.target, *operands, **keywords)
    replaced.meta["path"] = path_of(parts.node)
    return replaced


def _restored(editor: Editor, node: fx.Node, changed: fx.Node, chosen: ChannelAffine) -> fx.Node:
    """Return the norm's original value."""
    dtype, stem = value_of(changed).dtype, path_of(node) or node.name
    value = editor.call(aten.mul.Tensor, changed, editor.parameter(f"{stem}.restored_scale", chosen.scale.to(dtype)))
    if chosen.shift is None:
        return value
    return editor.call(aten.sub.Tensor, value, editor.parameter(f"{stem}.restored_shift", chosen.shift.to(dtype)))


def _output(node: fx.Node) -> fx.Node | None:
    """Return the normalized value of a norm, or None for anything else."""
    if is_call(node, *_NORMS):
        return node
    if is_call(node, *_SUM_NORMS):
        return next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    return None


def _linear_readers(editor: Editor, value: fx.Node, restore: bool) -> list[LinearParts] | Reject:
    """Return the linear layers that read ``value``, if they can be changed, and are all that do or need not be."""
    if is_returned(value) and not restore:
        return Reject("the program returns the norm")
    found: list[LinearParts] = []
    for reader in readers(value):
        if not is_call(reader, *_LINEAR) or operand(reader) is not value:
            if restore:
                continue
            return Reject(f"{target_name(reader.target)} reads the norm and is no linear layer")
        parts = linear_parts(editor, reader)
        if isinstance(parts, Reject):
            return parts
        if refusal := shared_parameter(parts):
            return refusal
        found.append(parts)
    return found or Reject("no linear layer reads the norm" if restore else "nothing reads the norm")


def _refuse_norm(editor: Editor, node: fx.Node) -> Reject | None:
    given = arguments(node)
    if given.get("groups", 1) != 1:
        return Reject("the norm is over groups of channels")
    if any(given.get(name) is not None and editor.constant(given[name]) is None for name in ("weight", "bias")):
        return Reject("the norm's weight or bias is computed")
    return None


def _changed_norm(editor: Editor, node: fx.Node, chosen: ChannelAffine) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """Return the norm's changed output, and what replaces its other outputs."""
    given, dtype = arguments(node), value_of(operand(node)).dtype
    weight, bias = editor.constant(given["weight"]), editor.constant(given.get("bias"))
    stem = path_of(node) or node.name
    new = (1 / chosen.scale if weight is None else weight.double() / chosen.scale).to(dtype)
    name = f"{stem}.weight" if weight is None else str(given["weight"].target)
    operands = [given[name] for name in ("x", "residual") if name in given]
    operands.append(editor.parameter(name, new))
    if bias is not None or chosen.shift is not None:
        name = f"{stem}.bias" if bias is None else str(given["bias"].target)
        total = (0 if bias is None else bias.double()) + (0 if chosen.shift is None else chosen.shift)
        operands.append(editor.parameter(name, (total / chosen.scale).to(dtype)))
    changed = editor.call(node.target, *operands, eps=given["eps"])
    if is_call(node, *_NORMS):
        return changed, {}
    others = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    replaced = {other: editor.call(operator.getitem, changed, 1) for other in others}
    return editor.call(operator.getitem, changed, 0), replaced
