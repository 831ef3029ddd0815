"""Compute every value once.

    a = f(x);  b = f(x)    ->    a = f(x);  b = a

**Exact**.  Run it after ``canonicalize``, which makes equal things look equal; equal tables of integers count as one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xformopt.match import arguments
from xformopt.pipeline import Context, Pass, PassResult
from xformopt.program import Level, Program, path_of
from xformopt.rewrite import Fired, trace_region

__all__ = ["EliminateCommonSubexpressions"]

aten = torch.ops.aten

_COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.eq.Tensor,
        aten.ne.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.__and__.Tensor,
        aten.__or__.Tensor,
    }
)
# these say where and how a value is stored, not what it is
_STORAGE = frozenset({"pin_memory", "layout", "non_blocking", "copy", "memory_format"})
# comparing larger parameters costs more than it finds
_COMPARED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Replace every value that was computed before by the first of its kind."""

    takes: ClassVar[Level] = Level.CAPTURED
    leaves: ClassVar[Level] = Level.CAPTURED

    def run(self, program: Program, context: Context) -> PassResult:
        """Number the values in one sweep: two are equal if operator, attributes and numbers of the inputs are."""
        result = program.copy()
        first: dict[Hashable, fx.Node] = {}
        fired: list[Fired] = []
        merged = _merge_parameters(result)
        for node in list(result.nodes()):
            if (key := _key(node)) is None:
                continue
            if (known := first.setdefault(key, node)) is not node:
                fired.append(_merge(result, node, known))
        if not fired and not merged:
            return PassResult(program, False)
        notes = (f"{merged} equal parameters merged",) if merged else ()
        return PassResult(result.drop_unused(), True, tuple(fired), notes=notes)


def _merge(program: Program, node: fx.Node, known: fx.Node) -> Fired:
    inputs = node.all_input_nodes
    before, after = (trace_region(program, (value,), inputs) for value in (node, known))
    node.replace_all_uses_with(known)
    program.graph.erase_node(node)
    return Fired("eliminate-common-subexpressions", path_of(node) or node.name, before, after)


def _key(node: fx.Node) -> Hashable | None:
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        given = {name: _freeze(value) for name, value in arguments(node).items() if name not in _STORAGE}
        if node.target in _COMMUTATIVE and given.get("alpha", 1) in (1, (int, 1)):
            operands = [given.pop(name) for name in ("self", "other")]
            return (node.target, frozenset(operands), tuple(given.items()))
        return (node.target, tuple(given.items()))
    return (node.target, _freeze(node.args), _freeze(dict(node.kwargs)))


def _freeze(value: Any) -> Hashable:
    """Make an argument hashable; numbers of different type stay different."""
    if isinstance(value, list | tuple):
        return tuple(_freeze(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _freeze(part)) for key, part in value.items())
    if isinstance(value, bool | int | float):
        # nan is not equal to itself, its text is
        return (type(value), value if value == value else "nan")
    return value  # type: ignore[no-any-return]


def _merge_parameters(program: Program) -> int:
    """Let all readers of equal small tables of integers read the first; returns how many became unused.

    Weights that happen to be equal stay apart: later passes may change one and not the other.
    """
    merged = 0
    known: dict[Hashable, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        value = program.parameters[str(node.target)]
        if value.is_floating_point() or value.numel() > _COMPARED_ELEMENTS:
            continue
        alike = known.setdefault((value.dtype, tuple(value.shape)), [])
        first = next((other for other in alike if _equal(program.parameters[str(other.target)], value)), None)
        if first is None:
            alike.append(node)
        elif node.users:
            node.replace_all_uses_with(first)
            merged += 1
    return merged


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)
