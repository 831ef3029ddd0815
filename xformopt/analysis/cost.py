"""What a Program costs by counting: parameters, floating-point operations and bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from xformopt.errors import UsageError
from xformopt.kernels.definition import find_operator
from xformopt.program import Program, example_sizes, path_of
from xformopt.program.text import BUILTINS, target_name

__all__ = ["Cost", "NodeCost", "cost", "operator_name"]

# operations an element of the result, by the conventions of the xf operators that compute the same
_PER_ELEMENT = {"gelu": 8, "silu": 8, "softmax": 8, "layer_norm": 8, "native_layer_norm": 8, "rms_norm": 4}
_GATHERS = frozenset({"embedding", "index", "index_select", "gather"})
_SIZE_FUNCTIONS = frozenset(BUILTINS.values())


@dataclass(frozen=True)
class NodeCost:
    """The cost of one value: ``bytes`` are read and written if nothing is kept in a cache between operators."""

    name: str
    path: str
    operator: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of a Program at given sizes; a multiply-add is two operations.

    Attributes:
        parameters: Elements of all parameters.
        parameter_bytes: Their bytes.
        flops: Floating-point operations.
        bytes: Bytes read and written by all operators, each by itself.
        nodes: Number of operators.
        operators: How many there are of each, by printed name without overload.
        by_node: The same for every value, in execution order.
        sizes: Size of each dynamic dimension.

    """

    parameters: int
    parameter_bytes: int
    flops: int
    bytes: int
    nodes: int
    operators: dict[str, int]
    by_node: tuple[NodeCost, ...]
    sizes: dict[str, int]


def cost(program: Program, sizes: Mapping[str, int] | None = None) -> Cost:
    """Count what ``program`` costs where its dimensions have ``sizes``; the rest are those of the example inputs.

    Raises:
        UsageError: a size is given for a dimension that the program does not have.
        ProgramError: a size lies outside its dimension's range.

    """
    chosen = example_sizes(program)
    for name in sizes or {}:
        if name not in program.dims:
            has = f"only {', '.join(program.dims.names)}" if program.dims.names else "none: its shapes are fixed"
            raise UsageError(f"The program has no dynamic dimension {name!r}; it has {has}.")
    chosen |= sizes or {}
    program.dims.check_sizes(chosen, "cost")
    by_node = tuple(_node_cost(program, node, chosen) for node in program.nodes())
    return Cost(
        parameters=sum(value.numel() for value in program.parameters.values()),
        parameter_bytes=program.parameter_bytes,
        flops=sum(node.flops for node in by_node),
        bytes=sum(node.bytes for node in by_node),
        nodes=len(by_node),
        operators=dict(Counter(node.operator for node in by_node).most_common()),
        by_node=by_node,
        sizes=chosen,
    )


def operator_name(target: object) -> str:
    """Return the printed name without overload: ``aten.add`` for ``aten.add.Tensor``."""
    return ".".join(target_name(target).split(".")[:2])


def _node_cost(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> NodeCost:
    def concrete(argument: fx.Node) -> Any:
        return _concrete(program, argument.meta["val"], sizes)

    def known(argument: fx.Node) -> Any:
        """Which blocks a mask keeps is what an operator with one costs."""
        value = program.parameters.get(str(argument.target)) if argument.op == "get_attr" else None
        return value if value is not None and value.dtype == torch.bool else concrete(argument)

    given = concrete if find_operator(node.target) is None else known
    args, kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
    result = _concrete(program, node.meta["val"], sizes)
    moved = 0 if _is_free(node) else _bytes_moved(node, [concrete(a) for a in node.all_input_nodes], result)
    flops = _flops(node, args, kwargs, result)
    return NodeCost(node.name, path_of(node), operator_name(node.target), int(flops), moved)


def _concrete(program: Program, value: Any, sizes: Mapping[str, int]) -> Any:
    """Return ``value`` at the given sizes: tensors without storage, sizes as numbers."""
    if isinstance(value, torch.Tensor):
        shape = [program.dims.evaluate(size, sizes) for size in program.dims.shape(value)]
        return torch.empty(shape, dtype=value.dtype, device="meta")
    if isinstance(value, torch.SymInt):
        return program.dims.evaluate(program.dims.expression(value), sizes)
    if isinstance(value, list | tuple):
        return type(value)(_concrete(program, part, sizes) for part in value)
    return value


def _is_free(node: fx.Node) -> bool:
    """Whether nothing is computed or moved: arithmetic on sizes, views, parts of a tuple."""
    return node.target in _SIZE_FUNCTIONS or (
        isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target._opname == "sym_size")
    )


def _bytes_moved(node: fx.Node, inputs: list[Any], result: Any) -> int:
    written = sum(map(_bytes, _tensors(result)))
    if getattr(node.target, "_opname", "") in _GATHERS:
        # of a table, only the rows that are asked for are read
        return 2 * written + sum(_bytes(t) for value in inputs for t in _tensors(value) if not t.is_floating_point())
    if getattr(node.target, "_opname", "") == "quantized_embedding":
        return written + _rows_read(inputs)
    return written + sum(_bytes(tensor) for value in inputs for tensor in _tensors(value))


def _rows_read(inputs: list[torch.Tensor]) -> int:
    """Count the bytes of the indices, and of the rows they ask for of codes, scales and zero points."""
    codes, indices, *steps = inputs
    return _bytes(indices) + sum(indices.numel() * _bytes(table) // len(table) for table in (codes, *steps))


def _flops(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if defined := find_operator(node.target):
        return int(defined.flops(*args, **kwargs))
    if _is_free(node) or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    elements = sum(tensor.numel() for tensor in _tensors(result) if tensor.is_floating_point())
    if node.target._opname in _PER_ELEMENT:
        return elements * _PER_ELEMENT[node.target._opname]
    if torch.Tag.pointwise in node.target.tags:
        return elements
    inputs = [tensor for value in args for tensor in _tensors(value)]
    if torch.Tag.reduction in node.target.tags:
        return sum(tensor.numel() for tensor in inputs if tensor.is_floating_point())
    return _count_products(node.target, args, kwargs) if inputs else 0


def _count_products(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Count matrix products and convolutions, also inside of operators made of others."""
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    with FlopCounterMode(display=False) as counter:
        target(*args, **kwargs)
    return int(counter.get_total_flops())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
