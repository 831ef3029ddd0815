"""Which parameters of a program can be trained, and as what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.program import Program, path_of

__all__ = ["Part", "is_chosen", "parts_of"]

aten = torch.ops.aten


class Part(StrEnum):
    """What a parameter is to the operator that reads it."""

    WEIGHT = "weights of linear layers"
    NORM = "norms"
    BIAS = "biases"
    SCALE = "scales"
    OTHER = "others"


_NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
_WEIGHTED = ("linear", "linear_activation", "ternary_weight")
_SCALES = ("scale", "x_scale")
# statistics and positions of codes; tables of angles follow from positions alone
_FIXED = ("zero", "x_zero", "running_mean", "running_var", "cos", "sin", "sample", "centroids")
_ANGLES = (aten.sin.default, aten.cos.default)
# masks are filled with large negative numbers; weights are not so large
_LARGEST = 1e4


def parts_of(program: Program) -> tuple[dict[str, Part], dict[str, str]]:
    """Return the parameters that can be trained, and the reasons why others cannot, by name; integers are neither."""
    found: dict[str, Part] = {}
    refused: dict[str, str] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = program.parameters[name]
        if not value.is_floating_point():
            continue
        reason = _refusal(node, value)
        if reason is None:
            found[name] = _part(node)
            if found[name] is Part.SCALE and not bool((value > 0).all()):
                reason = "it is a scale that is not positive"
        if reason is not None:
            refused[name] = reason
            found.pop(name, None)
    return found, refused


def is_chosen(program: Program, only: Sequence[str]) -> Mapping[str, bool]:
    """Return of each parameter whether its name, or the module path of a reader, fits one of the shell patterns."""
    chosen: dict[str, bool] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        names = (str(node.target), *(path_of(user) for user in node.users))
        chosen[str(node.target)] = any(fnmatchcase(name, pattern) for name in names for pattern in only)
    return chosen


def _refusal(node: fx.Node, value: torch.Tensor) -> str | None:
    if not bool(value.isfinite().all()) or bool((value.abs() > _LARGEST).any()):
        return "it holds values as large as those of a mask"
    for user, role in _roles(node):
        if role in _FIXED:
            return f"it is the {role} of %{user.name}, which follows from data or positions"
    if _makes_angles(node):
        return "angles of positions are computed from it"
    return None


def _part(node: fx.Node) -> Part:
    roles = [(user, role) for user, role in _roles(node)]
    if any(role in _SCALES for _, role in roles):
        return Part.SCALE
    for user, role in roles:
        if role == "weight" and any(is_call(user, getattr(xf, name)) for name in _WEIGHTED):
            return Part.WEIGHT
        if any(is_call(user, getattr(xf, name)) for name in _NORMS):
            return Part.NORM
    return Part.BIAS if any(role == "bias" for _, role in roles) else Part.OTHER


def _roles(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Yield the readers of a parameter, each with the name of the argument."""
    for user in node.users:
        if user.op == "call_function":
            yield from ((user, name) for name, given in arguments(user).items() if given is node)


def _makes_angles(node: fx.Node) -> bool:
    """Whether a parameter reaches a sine or cosine by way of plain arithmetic."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if is_call(user, *_ANGLES):
                return True
            is_plain = isinstance(user.target, torch._ops.OpOverload) and user.target.namespace == "aten"
            if is_plain and user not in seen:
                seen.add(user)
                pending.append(user)
    return False
