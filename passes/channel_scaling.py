"""Moving a scale per channel into linear layers, from the norm that they read or by a multiplication of its own.

norm(x; g, c) W^T + b    ->    norm(x; g / s, c / s) (W diag(s))^T + b
x W^T + b                ->    (x * 1/s) (W diag(s))^T + b
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, is_returned, operand, readers, xf
from xformopt.passes.weights import LinearParts, linear_parts, shared_parameter
from xformopt.program import Program, path_of, value_of
from xformopt.program.text import target_name
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["ChooseScale", "linear_inputs", "multiplying_rule", "norm_outputs", "scaling_rule"]

aten = torch.ops.aten

_LINEAR = (xf.linear, xf.linear_activation)
_NORMS = (xf.layer_norm, xf.rms_norm)
_SUM_NORMS = (xf.add_layer_norm, xf.add_rms_norm)
# factors this close to 1 change nothing that quantization sees
_BALANCED = 1e-3

# from the name of a norm's output and the weights that read it: s in float64, or why there is none
ChooseScale: TypeAlias = Callable[[str, Sequence[torch.Tensor]], "torch.Tensor | Reject"]


def norm_outputs(program: Program) -> list[str]:
    """Return the names of the normalized values of all norms, in execution order."""
    return [value.name for node in program.nodes() if (value := _output(node)) is not None]


def scaling_rule(wanted: Sequence[str], choose: ChooseScale) -> Rule:
    """Return a rule that fires at norms whose output is in ``wanted``."""
    known = frozenset(wanted)

    def scale_channels(editor: Editor, node: fx.Node) -> Mapping[fx.Node, fx.Node] | Reject | None:
        value = _output(node)
        if value is None or value.name not in known:
            return None
        linears = _linear_readers(editor, value)
        if isinstance(linears, Reject):
            return linears
        if refusal := _refuse_norm(editor, node):
            return refusal
        scale = choose(value.name, [parts.weight for parts in linears])
        if isinstance(scale, Reject):
            return scale
        if bool(((scale - 1).abs() < _BALANCED).all()):
            return Reject("activations and weights are balanced already")
        divided, replaced = _divided_norm(editor, node, scale)
        return {**replaced, **_scaled_linears(editor, linears, divided, scale)}

    return scale_channels


def linear_inputs(program: Program) -> dict[str, str]:
    """Return the name of the value that each linear layer reads, by the name of its weight, in execution order."""
    layers = [node for node in program.nodes() if is_call(node, *_LINEAR)]
    return {str(operand(node, 1).target): operand(node).name for node in layers}


def multiplying_rule(wanted: Mapping[str, str], choose: ChooseScale) -> Rule:
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
        return _scaled_linears(editor, linears, scaled, scale)

    return multiply_channels


def _scaled_linears(
    editor: Editor, linears: Sequence[LinearParts], source: fx.Node, scale: torch.Tensor
) -> dict[fx.Node, fx.Node]:
    """Return what replaces each layer: it reads ``source``, and its weight's columns are multiplied by ``scale``."""
    replaced: dict[fx.Node, fx.Node] = {}
    for parts in linears:
        weight = editor.parameter(parts.weight_name, (parts.weight.double() * scale).to(parts.weight.dtype))
        replaced[parts.node] = call_with(editor, parts.node, x=source, weight=weight)
        replaced[parts.node].meta["path"] = path_of(parts.node)
    return replaced


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


def _divided_norm(editor: Editor, node: fx.Node, scale: torch.Tensor) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """Return the norm's output divided by ``scale``, and what replaces its other outputs."""
    given, dtype = arguments(node), value_of(operand(node)).dtype
    weight, bias = editor.constant(given["weight"]), editor.constant(given.get("bias"))
    stem = path_of(node) or node.name
    new = (1 / scale if weight is None else weight.double() / scale).to(dtype)
    name = f"{stem}.weight" if weight is None else str(given["weight"].target)
    operands = [given[name] for name in ("x", "residual") if name in given]
    operands.append(editor.parameter(name, new))
    if bias is not None:
        operands.append(editor.parameter(str(given["bias"].target), (bias.double() / scale).to(dtype)))
    divided = editor.call(node.target, *operands, eps=given["eps"])
    if is_call(node, *_NORMS):
        return divided, {}
    others = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    replaced = {other: editor.call(operator.getitem, divided, 1) for other in others}
    return editor.call(operator.getitem, divided, 0), replaced
