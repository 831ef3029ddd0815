"""Structural verification: a Program is well formed and holds only what its level allows.

captured   functional ATen operators and arithmetic of sizes: what torch.export gave
lifted     xf operators of level "lifted"; ATen only where the dialect has no operator for it (``LIFTED_FORM``)
target     also xf operators of level "target": fused, packed, quantized
"""

from __future__ import annotations

import torch
from torch import fx

from xformopt.errors import ProgramError
from xformopt.kernels.definition import find_operator
from xformopt.program import Level, Program, infer_value, path_of
from xformopt.program.text import BUILTINS, format_type, target_name

__all__ = ["LIFTED_FORM", "check"]

# ATen operators that a lifted program no longer holds, with what holds their place
LIFTED_FORM = {
    "linear": "xf.linear",
    "addmm": "xf.linear",
    "mm": "xf.linear",
    "layer_norm": "xf.layer_norm",
    "native_layer_norm": "xf.layer_norm",
    "rms_norm": "xf.rms_norm",
    "gelu": "xf.activation",
    "silu": "xf.activation",
    "relu": "xf.activation",
}
_NAMESPACES = ("aten", "prims", "xf")


def check(program: Program, *, deep: bool = False) -> None:
    """Check ``program``; with ``deep``, also infer every value anew and compare it with what the graph records.

    Raises:
        ProgramError: naming the first value that is wrong, its place in the model, and why.
    """
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                raise _wrong(node, f"reads %{argument.name}, which is not computed before it")
        seen.add(node)
        _check_node(program, node, deep)
    _check_interface(program)


def _wrong(node: fx.Node, reason: str) -> ProgramError:
    where = f" (from {path_of(node)})" if path_of(node) else ""
    return ProgramError(f"The value %{node.name}{where} is not well formed: it {reason}.")


def _check_node(program: Program, node: fx.Node, deep: bool) -> None:
    if node.op == "output":
        return
    if node.op not in ("placeholder", "get_attr", "call_function"):
        raise _wrong(node, f"is a {node.op}, where only inputs, parameters and operators may stand")
    if "val" not in node.meta:
        raise _wrong(node, "has no inferred shape")
    if node.op == "get_attr":
        _check_parameter(program, node)
    if node.op == "call_function":
        _check_operator(program, node)
        if deep and (fresh := format_type(program, infer_value(program, node))) != (
            known := format_type(program, node.meta["val"])
        ):
            raise _wrong(node, f"is recorded as {known} but its operator computes {fresh}")


def _check_parameter(program: Program, node: fx.Node) -> None:
    value = program.parameters.get(str(node.target))
    if value is None:
        raise _wrong(node, f"names the parameter {node.target!r}, which the program does not hold")
    if tuple(value.shape) != tuple(node.meta["val"].shape) or value.dtype != node.meta["val"].dtype:
        raise _wrong(node, f"is recorded as {format_type(program, node.meta['val'])}, unlike the parameter it names")


def _check_operator(program: Program, node: fx.Node) -> None:
    if not isinstance(node.target, torch._ops.OpOverload):
        if node.target not in BUILTINS.values():
            raise _wrong(node, f"calls {target_name(node.target)}, which is neither an operator nor size arithmetic")
        return
    if node.target.namespace not in _NAMESPACES:
        raise _wrong(node, f"calls {target_name(node.target)}: operators must be of {', '.join(_NAMESPACES)}")
    if node.target._schema.is_mutable:
        raise _wrong(node, f"calls {target_name(node.target)}, which writes to its arguments")
    if reason := _not_allowed(program.level, node):
        raise _wrong(node, reason)


def _not_allowed(level: Level, node: fx.Node) -> str:
    operator = find_operator(node.target)
    name = target_name(node.target)
    if operator is not None:
        allowed = {"captured": (), "lifted": ("lifted",), "target": ("lifted", "target")}[level]
        return "" if operator.level in allowed else f"calls {name}, which a {level} program does not hold"
    short = getattr(node.target, "_opname", "")
    if level == Level.LIFTED and short in LIFTED_FORM and _is_liftable(node):
        return f"calls {name}, which a lifted program writes as {LIFTED_FORM[short]}"
    return ""


def _is_liftable(node: fx.Node) -> bool:
    """Whether the xf operator could hold the node: it has no form for products of two computed matrices, say."""
    short = getattr(node.target, "_opname", "")
    if short in ("mm", "addmm"):
        matrix = node.args[1 if short == "mm" else 2]
        return isinstance(matrix, fx.Node) and matrix.op == "get_attr"
    if short in ("layer_norm", "rms_norm"):
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    return short not in ("gelu", "silu", "relu") or node.meta["val"].is_floating_point()


def _check_interface(program: Program) -> None:
    placeholders = [str(node.target) for node in program.graph.find_nodes(op="placeholder")]
    if tuple(placeholders) != program.input_names:
        raise ProgramError(f"The graph takes {', '.join(placeholders)}, but the inputs are {program.input_names}.")
    if len(program.results) != len(program.outputs):
        raise ProgramError(f"The graph returns {len(program.results)} values for {len(program.outputs)} outputs.")
    for output in program.outputs:
        if output.mask is not None and output.mask not in program.input_names:
            raise ProgramError(f"The output {output.name} names the mask {output.mask!r}, which is no input.")
    if fixed := program.dims.specialized():
        raise ProgramError(f"The dimension {next(iter(fixed))} was fixed to {next(iter(fixed.values()))} by a rewrite.")
    unknown = {str(n.target) for n in program.graph.find_nodes(op="get_attr")} ^ set(program.parameters)
    if unknown:
        raise ProgramError(f"The parameter {sorted(unknown)[0]!r} is held but not read, or read but not held.")
