"""Find out what a piece of graph computes by running it on small chosen data.

Patterns over operators break with every release of a modelling library.  Instead, a rule takes the few operators
between two values, runs them, and looks at the result: index tensors tell what a chain of views does, a grid of numbers
tells which activation a formula is, random masks tell what a mask means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from xformopt.program import Program, Shape, value_of

__all__ = ["MOVEMENT", "Probe", "constant_factor", "is_movement", "movement_chain", "operator_name", "scaled_chain"]

# operators that copy, cut or reorder elements of one tensor and compute nothing
MOVEMENT = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze"),
        *("permute", "transpose", "swapaxes", "movedim", "t", "numpy_T", "mT"),
        *("expand", "expand_as", "repeat", "tile", "repeat_interleave"),
        *("slice", "select", "narrow", "split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk"),
        *("unbind", "getitem", "clone", "contiguous", "alias", "detach", "lift_fresh_copy"),
        *("dropout", "feature_dropout"),
    )
)


def operator_name(node: object) -> str:
    """Return the operator's short name, ``add`` for ``aten.add.Tensor``; empty for what is not an operator node."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    return getattr(node.target, "_opname", "") or getattr(node.target, "__name__", "")


def is_movement(node: object) -> bool:
    """Whether a node only moves elements of its first argument (a cast to the same dtype and a fixed choice do)."""
    name = operator_name(node)
    if name in ("_to_copy", "to"):
        assert isinstance(node, fx.Node)
        return value_of(node).dtype == value_of(node.args[0]).dtype  # type: ignore[arg-type]
    if name == "dropout":
        assert isinstance(node, fx.Node)
        return not (len(node.args) > 2 and node.args[2])
    if name in ("index", "index_select"):
        assert isinstance(node, fx.Node)
        chosen = node.all_input_nodes[1:]
        return all(index.op == "get_attr" and value_of(index).dtype == torch.int64 for index in chosen)
    return name in MOVEMENT


def movement_chain(node: fx.Node) -> list[fx.Node]:
    """Return ``node`` and what it moves, step by step back to the first value that is computed (the last entry)."""
    chain = [node]
    while is_movement(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def constant_factor(node: object) -> float | None:
    """Return c where a node is its first argument times the number c; None for any other node."""
    if not isinstance(node, fx.Node) or operator_name(node) not in ("mul", "div") or len(node.args) != 2:
        return None
    number = node.args[1]
    if not isinstance(number, int | float) or isinstance(number, bool) or number == 0:
        return None
    return float(number) if operator_name(node) == "mul" else 1 / number


def scaled_chain(node: fx.Node) -> list[fx.Node]:
    """As :func:`movement_chain`, seeing through products with numbers."""
    chain = [node]
    while is_movement(chain[-1]) or constant_factor(chain[-1]) is not None:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


class Probe:
    """Runs pieces of a Program's graph at given sizes of its dimensions (default: those of shape inference)."""

    def __init__(self, program: Program, sizes: Mapping[str, int] | None = None) -> None:
        self.program = program
        self.sizes = {**program.dims.hints, **(sizes or {})}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value at the probe's sizes."""
        return self.concrete(value_of(node).shape)

    def concrete(self, shape: Any) -> tuple[int, ...]:
        """Evaluate the shape of a fake tensor."""
        return self.sizes_of(tuple(self.program.dims.expression(size) for size in shape))

    def sizes_of(self, shape: Shape) -> tuple[int, ...]:
        """Evaluate a shape in dimension names."""
        return tuple(self.program.dims.evaluate(size, self.sizes) for size in shape)

    def positions(self, node: fx.Node) -> torch.Tensor:
        """Number the elements of a node's value in row-major order."""
        shape = self.shape(node)
        return torch.arange(torch.Size(shape).numel()).view(shape)

    def run(
        self,
        node: fx.Node,
        known: Mapping[fx.Node, Any],
        allowed: Callable[[fx.Node], bool] = lambda node: True,
        *,
        ignore_factors: bool = False,
    ) -> Any:
        """Evaluate ``node`` from the ``known`` values, parameters and sizes; None if it needs anything else.

        Operators for which ``allowed`` is false are never run; with ``ignore_factors``, products with a number
        return their tensor as it is.
        """
        values: dict[fx.Node, Any] = dict(known)
        pending = [node]
        while pending:
            current = pending[-1]
            if current in values:
                pending.pop()
                continue
            if (leaf := self._leaf(current)) is not None:
                values[current] = leaf
                continue
            if current.op != "call_function" or not allowed(current):
                return None
            missing = [argument for argument in current.all_input_nodes if argument not in values]
            if missing:
                pending.extend(missing)
                continue
            if ignore_factors and constant_factor(current) is not None:
                values[current] = values[current.args[0]]  # type: ignore[index]
            else:
                values[current] = self._call(current, values)
        return values[node]

    def _leaf(self, node: fx.Node) -> Any:
        if isinstance(node.meta.get("val"), torch.SymInt):
            dims = self.program.dims
            return dims.evaluate(dims.expression(node.meta["val"]), self.sizes)
        if node.op == "get_attr":
            return self.program.parameters[str(node.target)]
        return None

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        assert callable(node.target)
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def moved(self, node: fx.Node, source: fx.Node) -> torch.Tensor | None:
        """Return where each element of ``node`` comes from in ``source``, as flat positions; None if computed.

        Factors on the way are ignored.
        """
        moved = self.run(node, {source: self.positions(source)}, _moves_or_scales, ignore_factors=True)
        return moved if isinstance(moved, torch.Tensor) else None


def _moves_or_scales(node: fx.Node) -> bool:
    return is_movement(node) or constant_factor(node) is not None
