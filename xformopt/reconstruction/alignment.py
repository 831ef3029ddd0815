"""Finding the values that a program and a changed form of it have in common, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from xformopt.errors import ProgramError
from xformopt.program import Program, shape_of
from xformopt.reconstruction.blocks import Block, cut_at, residual_values

__all__ = ["Aligned", "align"]


@dataclass(frozen=True)
class Aligned:
    """Copies of two programs, in which values that correspond have the same names.

    Attributes:
        original: The program to match.
        changed: Another form of it.
        outputs: Returned values of floating point: the name of each output, and that of the value.
        residual: Sums on the residual stream that both compute in the same shape: module path, and name of the value.

    """

    original: Program
    changed: Program
    outputs: tuple[tuple[str, str], ...]
    residual: tuple[tuple[str, str], ...]

    def whole(self, name: str) -> Block:
        """Return the original as one block, whose outputs are all values in common."""
        values = tuple(value for _, value in (*self.outputs, *self.residual))
        block = cut_at(self.original, [(name, values)])[0]
        return replace(block, outputs=values)

    def blocks(self) -> tuple[Block, ...]:
        """Return the original cut at the sums on the residual stream."""
        return cut_at(self.original, [(path, [value]) for path, value in self.residual])


def align(original: Program, changed: Program) -> Aligned:
    """Give values that correspond the same names.

    Returned values correspond by the names of their outputs.  Sums on the residual stream do so by the module paths of
    the additions, in modules where both programs have equally many, of the same shapes.

    Raises:
        ProgramError: one program has an input or an output that the other one has not.

    """
    for kind, one, other in (
        ("inputs", original.input_names, changed.input_names),
        ("outputs", original.output_names, changed.output_names),
    ):
        if one != other:
            raise ProgramError(
                f"The original has the {kind} {', '.join(one)}, and the changed program has {', '.join(other)}: they "
                f"cannot be compared."
            )
    first, second = original.copy(), changed.copy()
    returned = zip(first.output_names, first.results, second.results, strict=True)
    names = _CommonNames(first, second)
    outputs = tuple(names.give(returned))
    return Aligned(first, second, outputs, tuple(names.give(_residual_twins(first, second))))


class _CommonNames:
    """Renames pairs of values; a value that has been in a pair is in no other one."""

    def __init__(self, *programs: Program) -> None:
        taken = {node.name for program in programs for node in program.graph.nodes}
        self.prefix = "common"
        while any(name.startswith(self.prefix) for name in taken):
            self.prefix += "_"
        self.seen: set[fx.Node] = set()
        self.count = 0

    def give(self, pairs: Iterable[tuple[str, fx.Node, fx.Node]]) -> Iterator[tuple[str, str]]:
        """Yield the label of each pair of computed floating-point values, and its name in common."""
        for label, *pair in pairs:
            if all(_is_computed(node) and node not in self.seen for node in pair):
                name = f"{self.prefix}{self.count}"
                for node in pair:
                    node._rename(name)
                self.seen.update(pair)
                self.count += 1
                yield label, name


def _residual_twins(one: Program, other: Program) -> Iterator[tuple[str, fx.Node, fx.Node]]:
    """Yield pairs of sums on the residual stream of two programs, each with its module path."""
    found = [_by_path(program) for program in (one, other)]
    for path, left in found[0].items():
        right = found[1].get(path, [])
        if path and [shape_of(one, node) for node in left] == [shape_of(other, node) for node in right]:
            yield from ((path, *pair) for pair in zip(left, right, strict=True))


def _by_path(program: Program) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for path, node in residual_values(program):
        found.setdefault(path, []).append(node)
    return found


def _is_computed(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()
