"""A Program in another floating-point type: rounded weights and values, the same graph but for casts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Set
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xformopt.program.interpret import infer_value
from xformopt.program.program import Program
from xformopt.program.text import DTYPE_NAMES

__all__ = ["HALF_PRECISIONS", "convert_precision", "numpy_interface", "widened"]

aten = torch.ops.aten

HALF_PRECISIONS = frozenset({torch.float16, torch.bfloat16})


def widened(program: Program) -> Program:
    """Return the program that computes in float32 whatever it was to compute in 16 bits.

    Weights keep their values and results come out more precise.  Inputs and outputs in bfloat16, which numpy does not
    have, become float32; those in float16 stay.
    """
    return convert_precision(program, HALF_PRECISIONS, torch.float32, interface={torch.bfloat16})


def numpy_interface(program: Program) -> Program:
    """Return the program with float32 inputs and outputs where they were bfloat16; inside, all is as before."""
    bfloat16 = {torch.bfloat16}
    return convert_precision(program, bfloat16, torch.float32, keep=lambda node: True, interface=bfloat16)


def convert_precision(
    program: Program,
    sources: Set[torch.dtype],
    to: torch.dtype,
    *,
    keep: Callable[[fx.Node], bool] = lambda node: False,
    interface: Collection[torch.dtype] = (),
) -> Program:
    """Return a program that computes in the type ``to`` what ``program`` computes in one of ``sources``.

    Args:
        program: What to convert; itself returned where nothing is of ``sources``.
        sources: The floating-point types to replace.
        to: What replaces them.  Weights and numbers beyond its range become its largest.
        keep: Says of an operator node that it computes as before, with casts between; those of complex numbers do.
        interface: Types of inputs and outputs that are replaced; others stay, with a cast inside.

    """
    if not any(_dtype(node) in sources for node in program.graph.nodes):
        return program
    return _Conversion(program, sources, to, keep, interface).run()


class _Conversion:
    """Builds the new graph node by node; ``made`` knows the value of each node of the old one, by its type."""

    def __init__(
        self,
        program: Program,
        sources: Set[torch.dtype],
        to: torch.dtype,
        keep: Callable[[fx.Node], bool],
        interface: Collection[torch.dtype],
    ) -> None:
        self.old = program
        self.new = replace(program, graph=fx.Graph(), parameters={})
        self.sources, self.to, self.interface = sources, to, interface
        self.kept = {node for node in program.nodes() if _is_complex(node) or keep(node)}
        self.made: dict[fx.Node, dict[torch.dtype | None, fx.Node]] = defaultdict(dict)

    def run(self) -> Program:
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "get_attr":
                self._weight(node)
            elif node.op == "call_function":
                self._operator(node)
        returned = [self._as(node, self._outside(node)) for node in self.old.results]
        self.new.graph.output(tuple(returned))
        self.new.inputs = tuple(replace(spec, dtype=self._crossing(spec.dtype)) for spec in self.old.inputs)
        self.new.example_inputs = {
            name: value.to(self._crossing(value.dtype)) for name, value in self.old.example_inputs.items()
        }
        return self.new.drop_unused()

    def _input(self, node: fx.Node) -> None:
        placeholder = self._copy(node)
        if _dtype(node) != self._outside(node):
            placeholder.meta["val"] = node.meta["val"].to(self._outside(node))
        self.made[node][self._outside(node)] = placeholder

    def _weight(self, node: fx.Node) -> None:
        """Store a weight in the type that its readers take it in, twice where they differ."""
        name, before = str(node.target), _dtype(node)
        types = dict.fromkeys(self._taken(node, reader) for reader in node.users)
        for dtype in types:
            value = self.old.parameters[name]
            own = name if len(types) == 1 or dtype == before else f"{name}.{DTYPE_NAMES[self.to]}"
            weight = self._copy(node)
            if dtype != before:
                assert dtype is not None
                value = _saturated(value, dtype)
                weight.target, weight.meta["val"] = own, node.meta["val"].to(dtype)
            self.new.parameters[own] = value
            self.made[node][dtype] = weight

    def _operator(self, node: fx.Node) -> None:
        def operand(value: fx.Node) -> fx.Node:
            return self._as(value, self._taken(value, node))

        given: Any = fx.map_arg((node.args, node.kwargs), operand)
        if node in self.kept:
            args, kwargs = given
        else:
            args, kwargs = fx.node.map_aggregate(given, self._plain)
            if node.target is aten._to_copy.default and kwargs.get("dtype") == _dtype(args[0]):
                # a cast between types that have become one
                self.made[node][self._inside(node)] = args[0]
                return
        copied = self.new.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        copied.meta = dict(node.meta)
        copied.meta["val"] = infer_value(self.new, copied)
        self.made[node][_dtype(copied)] = copied

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.new.graph.node_copy(node, lambda argument: argument)
        copied.meta = dict(node.meta)
        return copied

    def _as(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """Return the value of a node of the old graph in a type, by a cast where there is none yet."""
        found = self.made[node]
        if dtype not in found:
            found[dtype] = self._cast(next(iter(found.values())), dtype)
        return found[dtype]

    def _cast(self, source: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        target = aten._to_copy.default
        made = self.new.graph.create_node("call_function", target, (source,), {"dtype": dtype}, name="_to_copy")
        made.meta["path"] = source.meta.get("path", "")
        made.meta["val"] = infer_value(self.new, made)
        return made

    def _taken(self, value: fx.Node, reader: fx.Node) -> torch.dtype | None:
        """Return the type in which a reader takes a value."""
        if reader.op == "output":
            return self._outside(value)
        return _dtype(value) if reader in self.kept else self._inside(value)

    def _inside(self, node: fx.Node) -> torch.dtype | None:
        return self.to if _dtype(node) in self.sources else _dtype(node)

    def _outside(self, node: fx.Node) -> torch.dtype | None:
        dtype = _dtype(node)
        return dtype if dtype is None else self._crossing(dtype)

    def _crossing(self, dtype: torch.dtype) -> torch.dtype:
        return self.to if dtype in self.sources and dtype in self.interface else dtype

    def _plain(self, value: Any) -> Any:
        """Convert an argument that is no node: a type, or a number beyond the range of the new one."""
        if isinstance(value, torch.dtype):
            return self.to if value in self.sources else value
        if isinstance(value, float) and math.isfinite(value):
            limit = torch.finfo(self.to).max
            return min(max(value, -limit), limit)
        return value


def _dtype(node: fx.Node) -> torch.dtype | None:
    """Return what a node computes in; None for one that computes a size, or several values."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _is_complex(node: fx.Node) -> bool:
    """Whether a node reads or returns complex numbers, which have their type from what they are made of."""
    return any((dtype := _dtype(value)) is not None and dtype.is_complex for value in (node, *node.all_input_nodes))


def _saturated(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(value.dtype).max:
        return value.to(dtype)
    return torch.where(value.isinf(), value, value.clamp(-limit, limit)).to(dtype)
