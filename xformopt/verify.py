"""Structural verification: whether a Program is well formed and keeps to its level.

Three levels, each a set of operators:

    captured    functional ATen and arithmetic on sizes
    lifted      that, without the ATen operators that have a form in the xf dialect, and xf operators of level "lifted"
    target      that, and xf operators of level "target"
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from xformopt.errors import ProgramError
from xformopt.kernels.definition import find_operator
from xformopt.match import arguments
from xformopt.program import Level, Program, infer_value, path_of
from xformopt.program.text import BUILTINS, format_type, target_name

__all__ = ["LIFTED_FORMS", "check"]

aten = torch.ops.aten


def _always(node: fx.Node) -> bool:
    return True


def _one_axis(node: fx.Node) -> bool:
    return len(arguments(node)["normalized_shape"]) == 1


# what lifting replaces, by what, and for which nodes; attention that is no attention over the channels of [B, T, C]
# stays ATen, with lifting's reason on record
LIFTED_FORMS: dict[object, tuple[str, Callable[[fx.Node], bool]]] = {
    aten.linear.default: ("xf.linear", _always),
    aten.gelu.default: ("xf.activation", _always),
    aten.silu.default: ("xf.activation", _always),
    aten.layer_norm.default: ("xf.layer_norm", _one_axis),
    aten.native_layer_norm.default: ("xf.layer_norm", _one_axis),
    aten.rms_norm.default: ("xf.rms_norm", _one_axis),
}
_NAMESPACES = ("aten", "prims", "xf")
_SIZE_FUNCTIONS = frozenset(BUILTINS.values())


def check(program: Program, level: Level | None = None, *, deep: bool = False) -> None:
    """Raise unless ``program`` is well formed.

    Args:
        program: What to look at; it is not changed.
        level: The level whose operators are allowed; the program's own by default.
        deep: Also infer every value afresh and compare it with the recorded one.

    Raises:
        ProgramError: the first thing that is wrong, with the value's name and module path.

    """
    _check_order(program)
    _check_inputs(program)
    _check_parameters(program)
    for node in program.nodes():
        _check_operator(node, level or program.level)
        if deep:
            _check_inference(program, node)
    _check_outputs(program)


def _fail(node: fx.Node, problem: str) -> ProgramError:
    where = f" at {path_of(node)}" if path_of(node) else ""
    return ProgramError(f"The program is not well formed: %{node.name}{where} {problem}.")


def _check_order(program: Program) -> None:
    """Every value is defined once, before it is read, and knows what it is."""
    defined: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in defined:
                raise _fail(node, f"reads %{argument.name}, which is not defined above it")
        if node.name in names:
            raise _fail(node, "is defined twice")
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise _fail(node, f"is a {node.op}, which a Program does not hold")
        if node.op != "output" and "val" not in node.meta:
            raise _fail(node, 'has no shape: its meta["val"] is missing')
        defined.add(node)
        names.add(node.name)
    if program.output_node.op != "output" or len(program.graph.find_nodes(op="output")) != 1:
        raise ProgramError("The program is not well formed: its graph must end in its one output node.")


def _check_inputs(program: Program) -> None:
    nodes = program.graph.find_nodes(op="placeholder")
    names = tuple(str(node.target) for node in nodes)
    if names != program.input_names:
        raise ProgramError(
            f"The program is not well formed: its graph takes {', '.join(names) or 'nothing'}, but its inputs are "
            f"{', '.join(program.input_names) or 'none'}."
        )
    for node, spec in zip(nodes, program.inputs, strict=True):
        declared = format_type(program, program.dims.fake(spec.shape, spec.dtype))
        if format_type(program, node.meta["val"]) != declared:
            raise _fail(node, f"is {format_type(program, node.meta['val'])}, but its input is declared {declared}")


def _check_parameters(program: Program) -> None:
    nodes = {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}
    for name, node in nodes.items():
        if name not in program.parameters:
            raise _fail(node, f"reads the parameter {name!r}, which does not exist")
        value = program.parameters[name]
        stored = format_type(program, program.dims.fake(tuple(value.shape), value.dtype))
        if format_type(program, node.meta["val"]) != stored:
            raise _fail(node, f"is {format_type(program, node.meta['val'])}, but its parameter is {stored}")
    if unused := [name for name in program.parameters if name not in nodes]:
        raise ProgramError(f"The program is not well formed: nothing reads its parameter {unused[0]!r}.")


def _check_operator(node: fx.Node, level: Level) -> None:
    name = target_name(node.target)
    if node.target in _SIZE_FUNCTIONS:
        return
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in _NAMESPACES:
        raise _fail(node, f"calls {name}, which is neither an ATen operator, nor one of xf, nor arithmetic on sizes")
    if node.target._schema.is_mutable:
        raise _fail(node, f"calls {name}, which changes its argument in place; a Program is functional")
    operator = find_operator(node.target)
    if operator is not None and not _reaches(level, Level(operator.level)):
        raise _fail(node, f"calls {name}, an operator of level {operator.level}, in a program of level {level}")
    form, applies = LIFTED_FORMS.get(node.target, ("", _always))
    if form and _reaches(level, Level.LIFTED) and applies(node):
        raise _fail(node, f"calls {name}, which is written {form} in a program of level {level}")


def _reaches(level: Level, needed: Level) -> bool:
    order = list(Level)
    return order.index(level) >= order.index(needed)


def _check_inference(program: Program, node: fx.Node) -> None:
    recorded = format_type(program, node.meta["val"])
    try:
        computed = format_type(program, infer_value(program, node))
    except Exception as error:
        raise _fail(node, f"is refused by its operator {target_name(node.target)} ({error})") from error
    if computed != recorded:
        raise _fail(node, f"is recorded as {recorded}, but {target_name(node.target)} computes {computed}")


def _check_outputs(program: Program) -> None:
    values = program.output_node.args[0]
    if not isinstance(values, tuple | list) or len(program.results) != len(values):
        raise ProgramError("The program is not well formed: it must return a tuple of values.")
    if len(values) != len(program.outputs):
        raise ProgramError(
            f"The program is not well formed: it returns {len(values)} values, but has {len(program.outputs)} outputs "
            f"({', '.join(program.output_names)})."
        )
    if len(set(program.output_names)) != len(program.outputs):
        raise ProgramError(f"The program is not well formed: output names repeat ({', '.join(program.output_names)}).")
    for spec, node in zip(program.outputs, program.results, strict=True):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise _fail(node, f"is returned as {spec.name!r}, but is no tensor")
        if spec.mask is not None and spec.mask not in program.input_names:
            raise _fail(node, f"is valid where {spec.mask!r} says so, but there is no such input")
