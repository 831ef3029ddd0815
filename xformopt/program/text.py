"""The text of a Program: one line per value, readable, diffable, and parsed back.

    program "encoder" lifted
    dim batch in [1, inf]
    input %x: f32[batch,384]
    param %w: f32[384,384]
    %y: f32[batch,384] = xf.linear(%x, %w)  # encoder.layer.0
    return y=%y

Tensors stand in parentheses in the order of the operator's schema; every other argument is named in braces and left out
where it equals the schema's default.  A trailing comment is the source module path.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from xformopt.program.dims import Dim
from xformopt.program.program import Program, path_of

__all__ = ["BUILTINS", "DTYPE_NAMES", "canonical_text", "format_program", "format_type", "target_name"]

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}

# functions of sizes and tuples that are not torch operators
BUILTINS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    "pow": operator.pow,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_float": torch.sym_float,
    "sym_int": torch.sym_int,
    "sym_not": torch.sym_not,
    "sym_ite": torch.sym_ite,
}
_BUILTIN_NAMES = {function: name for name, function in BUILTINS.items()}
_PLAIN_STRING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYWORDS = {"true", "false", "none", "inf", "nan"}


def target_name(target: object) -> str:
    """Return the printed name of a node's target: ``xf.attention``, ``aten.add.Tensor``, ``size.mul``."""
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"{target.namespace}.{target._opname}{overload}"
    if callable(target) and target in _BUILTIN_NAMES:
        return f"size.{_BUILTIN_NAMES[target]}"
    return f"python.{getattr(target, '__name__', repr(target))}"


def format_program(program: Program) -> str:
    """Return the whole text of ``program``."""
    lines = [f'program "{program.name}" {program.level}']
    lines += [f"dim {program.dims[name]}" for name in program.dims.names]
    for spec in program.inputs:
        bound = "" if spec.bound is None else f" below {spec.bound}"
        default = "" if spec.default is None else f" default {spec.default}"
        lines.append(f"input %{spec.name}: {_format_spec(spec.dtype, spec.shape)}{bound}{default}")
    names = value_names(program)
    for name, value in program.parameters.items():
        lines.append(f"param %{name}: {_format_spec(value.dtype, tuple(value.shape))}")
    lines += [format_node(program, node, names) for node in program.nodes()]
    returned = []
    for output, node in zip(program.outputs, program.results, strict=True):
        valid = f" valid {output.mask_means} %{output.mask}" if output.mask else ""
        returned.append(f"{output.name}=%{names[node]}{valid}")
    lines.append("return " + ", ".join(returned))
    return "\n".join(lines) + "\n"


def value_names(program: Program) -> dict[fx.Node, str]:
    """Return the printed name of every value: parameters by their key, all else by node name."""
    return {n: str(n.target) if n.op == "get_attr" else n.name for n in program.graph.nodes}


def format_node(program: Program, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """Return the line of one operator node."""
    operands, attributes = split_arguments(node)
    inside = ", ".join(_format_value(operand, names) for operand in operands)
    named = ", ".join(f"{key}={_format_value(value, names)}" for key, value in attributes.items())
    braces = f" {{{named}}}" if named else ""
    comment = f"  # {path_of(node)}" if path_of(node) else ""
    kind = format_type(program, node.meta["val"])
    return f"%{names[node]}: {kind} = {target_name(node.target)}({inside}){braces}{comment}"


def split_arguments(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Return a node's tensor operands in schema order, and its other arguments by name without the defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    operands: list[Any] = []
    attributes: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        if "Tensor" in str(argument.type):
            operands.append(given)
        elif given != argument.default_value or isinstance(given, bool) != isinstance(argument.default_value, bool):
            attributes[argument.name] = given
    while operands and operands[-1] is None:
        operands.pop()
    return operands, attributes


def format_type(program: Program, value: object) -> str:
    """Return the printed type of a value: ``f32[batch,384]``, ``size[2*length]``, ``(f32[4], i64[4])``."""
    if isinstance(value, torch.Tensor):
        sizes = ",".join(str(size).replace(" ", "") for size in program.dims.shape(value))
        return f"{DTYPE_NAMES[value.dtype]}[{sizes}]"
    if isinstance(value, torch.SymInt):
        return f"size[{str(program.dims.expression(value)).replace(' ', '')}]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"size[{value}]"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(format_type(program, part) for part in value) + ")"
    return {type(None): "none", bool: "flag", torch.SymBool: "flag"}.get(type(value), type(value).__name__)


def canonical_text(program: Program) -> tuple[str, list[str]]:
    """Return the text with values numbered and comments dropped, and the parameters in order of first use."""
    names: dict[fx.Node, str] = {}
    parameters: list[str] = []
    lines = [
        str(program.level),
        *(f"{spec.dtype} {spec.shape} {spec.default or ''}".rstrip() for spec in program.inputs),
    ]
    lines += [str(Dim("", program.dims[name].low, program.dims[name].high)) for name in program.dims.names]
    for spec, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        names[node] = f"i{len(names)}.{spec.name}"
    for node in program.nodes():
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in names:
                names[argument] = f"p{len(parameters)}"
                parameters.append(str(argument.target))
        names[node] = f"v{len(names)}"
        lines.append(format_node(program, node, names).split("  # ")[0])
    for node in program.results:
        if node not in names:
            names[node] = f"p{len(parameters)}"
            parameters.append(str(node.target))
        lines.append(f"return {names[node]}")
    return "\n".join([*lines, *program.output_names]), parameters


def _format_spec(dtype: torch.dtype, shape: tuple[int | str, ...]) -> str:
    return f"{DTYPE_NAMES[dtype]}[{','.join(map(str, shape))}]"


def _format_value(value: object, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{names[value]}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_format_value(part, names) for part in value) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, str):
        plain = _PLAIN_STRING.fullmatch(value) and value not in _KEYWORDS
        return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return f'"{value}"'
    return repr(value)


def parse_program(text: str, *, parameters: Mapping[str, torch.Tensor] | None = None, seed: int = 0) -> Program:
    """See :meth:`Program.parse`."""
    from xformopt.program.parse import Parser

    return Parser(text, parameters, seed).program()
