"""What a Program costs: parameters, floating-point operations, bytes moved, operators by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.kernels.definition import find_operator
from xformopt.program import Program, path_of
from xformopt.program.text import target_name

__all__ = ["Cost", "NodeCost", "cost"]

# element-wise ATen operators cost one operation an element; these move data and cost none
_FREE = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "permute"),
        *("transpose", "t", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "getitem", "clone"),
        *("contiguous", "alias", "detach", "_to_copy", "cat", "stack", "embedding", "gather", "index", "index_select"),
        *("arange", "full", "zeros", "ones", "scalar_tensor", "full_like", "sym_size", "constant_pad_nd", "roll"),
        *("lift_fresh_copy", "new_ones", "new_zeros", "zeros_like", "ones_like", "repeat", "where", "masked_fill"),
    )
)


@dataclass(frozen=True)
class NodeCost:
    """One operator node: its value's name, operator, module path, operations, and bytes read and written."""

    name: str
    operator: str
    path: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of one run; one multiply-add is two operations.

    ``bytes`` counts every operator's inputs, parameters and outputs once: what a run without fusion must move.
    """

    parameters: int
    parameter_bytes: int
    flops: int
    bytes: int
    nodes: int
    operators: dict[str, int]
    by_node: tuple[NodeCost, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the form of ``inspect --cost --json``."""
        return {
            "parameters": self.parameters,
            "parameter_bytes": self.parameter_bytes,
            "flops": self.flops,
            "bytes": self.bytes,
            "nodes": self.nodes,
            "operators": self.operators,
        }


def cost(program: Program, sizes: Mapping[str, int]) -> Cost:
    """Return the cost of ``program`` where every dimension has the given size."""
    nodes = tuple(_node_cost(program, node, sizes) for node in program.nodes())
    counts = Counter(target_name(node.target) for node in program.nodes())
    return Cost(
        parameters=sum(value.numel() for value in program.parameters.values()),
        parameter_bytes=program.parameter_bytes,
        flops=sum(node.flops for node in nodes),
        bytes=sum(node.bytes for node in nodes),
        nodes=len(nodes),
        operators=dict(sorted(counts.items())),
        by_node=nodes,
    )


def _node_cost(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> NodeCost:
    def evaluate(size: Any) -> int:
        if isinstance(size, torch.SymInt):
            return program.dims.evaluate(program.dims.expression(size), sizes)
        return int(size)

    moved = sum(_bytes(argument.meta.get("val"), evaluate) for argument in node.all_input_nodes)
    moved += _bytes(node.meta["val"], evaluate)
    name = target_name(node.target)
    return NodeCost(node.name, name, path_of(node), evaluate(_flops(node)), 0 if name.startswith("size.") else moved)


def _bytes(value: Any, evaluate: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_bytes(part, evaluate) for part in value)
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(evaluate(size) for size in value.shape) * value.element_size()


def _flops(node: fx.Node) -> Any:
    """Return the operations of a node, as an int or a symbolic size."""
    operator = find_operator(node.target)
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    if operator is not None:
        return operator.flops(*args, **fx.map_arg(node.kwargs, lambda n: n.meta["val"]))
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
    value = node.meta["val"]
    if name in _FREE or not isinstance(value, torch.Tensor):
        return 0
    if name in ("matmul", "mm", "bmm", "linear"):
        return 2 * value.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * value.numel() * args[1].shape[-1]
    if name in ("convolution", "conv1d", "conv2d", "conv3d", "_convolution"):
        weight = args[1]
        return 2 * value.numel() * (weight.numel() // weight.shape[0])
    if name == "scaled_dot_product_attention":
        q, k, v = args[:3]
        return 2 * q.numel() // q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if name in ("softmax", "_softmax", "layer_norm", "native_layer_norm", "gelu", "silu"):
        return 8 * value.numel()
    if name in ("sum", "mean", "var", "amax", "cumsum", "norm"):
        return args[0].numel()
    return value.numel() if value.is_floating_point() else 0
