"""Removing units: every coupled parameter is cut, and every operator that names a size is told the new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.analysis.coupling import Group
from xformopt.errors import PassError
from xformopt.match import arguments, is_call, xf
from xformopt.program import Program, infer_value, path_of
from xformopt.program.text import target_name

__all__ = ["refuse_fused", "remove_units"]

aten = torch.ops.aten
_FUSED = (xf.linear_activation, xf.add_layer_norm, xf.add_rms_norm)


def refuse_fused(program: Program, what: str) -> None:
    """Raise PassError where layers are fused: which channels run through them is not seen, and others would have to go.

    Args:
        program: What is to be pruned.
        what: The name of the pass.

    """
    fused = {target_name(node.target) for node in program.nodes() if is_call(node, *_FUSED)}
    if fused:
        raise PassError(
            f"The program {program.name!r} has fused layers ({', '.join(sorted(fused))}), whose units {what} cannot "
            f"see. Run the pass before those that fuse, as --pass does."
        )


def remove_units(program: Program, kept: Mapping[Group, torch.Tensor]) -> Program:
    """Return ``program`` without the units that are not kept; names of values and parameters stay.

    Args:
        program: A lifted program.
        kept: For groups of this program, which units stay, bool ``[units]``.

    Raises:
        PassError: nothing would be left of a group, or an operator cannot take the new sizes.

    """
    for group, stays in kept.items():
        if not bool(stays.any()):
            raise PassError(
                f"Pruning would remove every unit of {group.path} ({group.units} {group.kind}). Keep at least one, or "
                f"remove the whole sublayer with prune-sublayers."
            )
    result = program.copy()
    survivors = {axis: stays[units] for group, stays in kept.items() for axis, units in group.values.items()}
    _cut_parameters(result, kept)
    for node in result.graph.nodes:
        if node.op == "get_attr":
            value = result.parameters[str(node.target)]
            node.meta["val"] = result.dims.fake(tuple(value.shape), value.dtype)
        elif node.op == "call_function":
            _resize(result, node, _Survivors(survivors, node))
    return result


def _cut_parameters(program: Program, kept: Mapping[Group, torch.Tensor]) -> None:
    for group, stays in kept.items():
        for (name, axis), units in group.parameters.items():
            chosen = stays[units].nonzero().squeeze(1)
            program.parameters[name] = program.parameters[name].index_select(axis, chosen)


@dataclass(frozen=True)
class _Survivors:
    """Which entries of the axes around one operator stay."""

    found: Mapping[tuple[str, int], torch.Tensor]
    node: fx.Node

    def of(self, value: fx.Node, axis: int) -> torch.Tensor | None:
        """Return which entries of an axis stay, bool ``[size]``; None for an axis that is not cut."""
        return self.found.get((value.name, axis))

    def resized(self, count: int, value: fx.Node, axis: int) -> int:
        """Return what is left of ``count`` equal parts of an axis."""
        stays = self.of(value, axis)
        return count if stays is None else count * int(stays.sum()) // len(stays)

    def before(self, value: fx.Node, axis: int, position: int) -> int:
        """Return how many entries stay in front of ``position``."""
        stays = self.of(value, axis)
        return position if stays is None else int(stays[:position].sum())


def _resize(program: Program, node: fx.Node, survivors: _Survivors) -> None:
    """Adapt the sizes in an operator's arguments, and infer what it computes now."""
    rule = _RULES.get(node.target)
    if rule is not None:
        for name, value in rule(survivors, node).items():
            _set_argument(node, name, value)
    try:
        node.meta["val"] = infer_value(program, node)
    except Exception as error:
        raise PassError(
            f"After pruning, %{node.name} at {path_of(node) or 'the top'} cannot take its operands: {error}"
        ) from error


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _attention(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
    given = arguments(node)
    return {
        "heads": survivors.resized(given["heads"], given["q"], 2),
        "kv_heads": survivors.resized(given["kv_heads"], given["k"], 2),
    }


def _rope(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
    return {"heads": survivors.resized(arguments(node)["heads"], node, 2)}


def _norm(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
    given = arguments(node)
    if given["groups"] == 1:
        return {}
    return {"groups": survivors.resized(given["groups"], node, node.meta["val"].dim() - 1)}


def _sizes(name: str) -> Callable[[_Survivors, fx.Node], dict[str, Any]]:
    """Adapt the sizes that a list names; -1 and dynamic sizes follow by themselves."""

    def rule(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
        named = arguments(node)[name]
        return {
            name: [
                survivors.resized(size, node, axis) if isinstance(size, int) and size > 0 else size
                for axis, size in enumerate(named)
            ]
        }

    return rule


def _slice(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
    given = arguments(node)
    x: fx.Node = given["self"]
    axis = given["dim"] % node.meta["val"].dim()
    stays = survivors.of(x, axis)
    if stays is None:
        return {}
    ends = slice(given["start"], given["end"]).indices(len(stays))
    return {name: survivors.before(x, axis, end) for name, end in zip(("start", "end"), ends, strict=False)}


def _split(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
    """Adapt the sizes of the parts; equal parts that become unequal cannot be named by one size."""
    given = arguments(node)
    x: fx.Node = given["self"]
    parts = node.meta["val"]
    axis = given["dim"] % parts[0].dim()
    stays = survivors.of(x, axis)
    if stays is None:
        return {}
    sizes = [int(part.sum()) for part in stays.split([int(part.shape[axis]) for part in parts])]
    if is_call(node, aten.split_with_sizes.default):
        return {"split_sizes": sizes}
    if len(set(sizes)) > 1:
        raise PassError(f"Pruning leaves parts of {sizes} channels where %{node.name} cuts equal ones.")
    return {} if is_call(node, aten.chunk.default) else {"split_size": sizes[0]}


def _convolution(survivors: _Survivors, node: fx.Node) -> dict[str, Any]:
    given = arguments(node)
    return {} if given["groups"] == 1 else {"groups": survivors.resized(given["groups"], node, 1)}


_RULES: dict[object, Callable[[_Survivors, fx.Node], dict[str, Any]]] = {
    xf.attention: _attention,
    xf.rope: _rope,
    xf.layer_norm: _norm,
    xf.rms_norm: _norm,
    aten.reshape.default: _sizes("shape"),
    aten.view.default: _sizes("size"),
    aten.expand.default: _sizes("size"),
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
}
