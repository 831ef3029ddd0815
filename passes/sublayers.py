"""Sublayers: the branches that a residual stream can do without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.match import arguments, is_call, xf
from xformopt.program import Program, path_of, shape_of

__all__ = ["Sublayer", "find_sublayers", "remove_sublayers", "stream_of"]


@dataclass(frozen=True)
class Sublayer:
    """A branch y = f(x) that is added to the stream x it reads.

    Attributes:
        total: Name of the residual sum ``s = x + y``.
        stream: Name of x.
        branch: Name of y.
        path: Where y is computed.
        is_attention: Whether tokens are mixed by attention in it.

    """

    total: str
    stream: str
    branch: str
    path: str
    is_attention: bool


def find_sublayers(program: Program) -> list[Sublayer]:
    """Return the sublayers of a program in execution order."""
    above: dict[fx.Node, set[fx.Node]] = {}
    for node in program.graph.nodes:
        above[node] = set(node.all_input_nodes).union(*(above[value] for value in node.all_input_nodes))
    found = []
    for node in program.nodes():
        if not is_call(node, torch.ops.aten.add.Tensor) or arguments(node)["alpha"] != 1:
            continue
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node) and term.op == "call_function"]
        if len(terms) != 2 or shape_of(program, terms[0]) != shape_of(program, terms[1]):
            continue
        stream, branch = terms if terms[0] in above[terms[1]] else terms[::-1]
        if stream in above[branch]:
            inside = {value for value in above[branch] if stream in above[value]} | {branch}
            mixes = any(is_call(value, xf.attention) for value in inside)
            found.append(Sublayer(node.name, stream.name, branch.name, path_of(branch) or branch.name, mixes))
    return found


def remove_sublayers(program: Program, removed: Iterable[Sublayer]) -> Program:
    """Return ``program`` with the sums of the named sublayers replaced by their streams."""
    result = program.copy()
    named = {node.name: node for node in result.graph.nodes}
    for sublayer in removed:
        total = named[sublayer.total]
        total.replace_all_uses_with(stream_of(total, named[sublayer.branch]))
    return result.drop_unused()


def stream_of(total: fx.Node, branch: fx.Node) -> fx.Node:
    """Return what a sum adds a branch to: not always the first stream, as a sublayer in front of it may have gone."""
    return total.all_input_nodes[1 - total.all_input_nodes.index(branch)]
