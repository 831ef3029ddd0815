"""Which entries of which axes can only be removed together: the structure that pruning works on.

Two axes that an operator links belong together, and so does everything linked to either: the hidden width of an FFN is
the rows of its first weight, its bias, the activation, and the columns of its second weight; the residual width runs
through every block.  The axes are the vertices of a graph, the links its edges; each connected component is a
:class:`Group`.  Inside it, entries that are linked to each other, directly or by way of others, form a *unit*: one
channel, or all channels of a head in queries, keys, values and their output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import networkx as nx
import torch
from torch import fx

from xformopt.analysis.axes import find_links
from xformopt.analysis.links import Axis, Link, rank, size_of
from xformopt.match import arguments, is_call, xf
from xformopt.program import Program, path_of

__all__ = ["Group", "Kind", "find_groups"]

aten = torch.ops.aten

# heads of attention, units of an FFN, channels of the residual stream, anything else
Kind: TypeAlias = Literal["heads", "hidden", "width", "other"]


@dataclass(frozen=True, eq=False)
class Group:
    """Axes that are pruned together.

    Attributes:
        kind: What its units are.
        units: How many there are.
        values: The unit of every entry of an axis, ``[size]``, by value name and axis; parameters included.
        parameters: The same of parameters alone, by the name of the parameter and axis.
        consumers: Names of the linear layers that read the group on their input's last axis, in execution order.
        path: Where the first of them is.
        pinned: Why it must stay as it is, if it must.

    """

    kind: Kind
    units: int
    values: dict[tuple[str, int], torch.Tensor]
    parameters: dict[tuple[str, int], torch.Tensor]
    consumers: tuple[str, ...]
    path: str
    pinned: str | None

    @cached_property
    def entries_per_unit(self) -> int:
        """How many channels a unit has where a consumer reads it (the first one)."""
        sizes = [len(unit) for unit in self.parameters.values()]
        return max(1, max(sizes, default=1) // self.units)


def find_groups(program: Program, kind: Kind | None = None) -> list[Group]:
    """Return the groups of a lifted program that hold a parameter, in execution order; of one kind where asked."""
    links = find_links(program)
    graph = nx.Graph()
    for link in links.found:
        graph.add_edge(link.one, link.other)
    by_axis: dict[Axis, list[Link]] = {}
    for link in links.found:
        by_axis.setdefault(link.one, []).append(link)
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    groups = []
    for component in nx.connected_components(graph):
        axes = sorted(component, key=lambda axis: (order[axis[0]], axis[1]))
        if any(node.op == "get_attr" for node, _ in axes):
            units = _units(axes, [link for axis in axes for link in by_axis.get(axis, ())])
            group = _group(axes, units, links.pins)
            # parameters stand in front of everything: a group begins where something is computed
            start = min((order[node] for node, _ in axes if node.op != "get_attr"), default=0)
            groups.append((start, group))
    found = [group for _, group in sorted(groups, key=lambda pair: pair[0])]
    return [group for group in found if kind in (None, group.kind)]


def _units(axes: Iterable[Axis], links: list[Link]) -> dict[Axis, torch.Tensor]:
    """Number the classes of linked entries; each axis gets the class of every entry of it."""
    first: dict[Axis, int] = {}
    total = 0
    for axis in axes:
        first[axis] = total
        total += size_of(axis) or 0
    ones = torch.cat([link.one_entries + first[link.one] for link in links])
    others = torch.cat([link.other_entries + first[link.other] for link in links])
    label = torch.arange(total)
    # every entry takes the smallest number that it is linked to, then that number's own, until nothing changes
    while True:
        least = torch.minimum(label[ones], label[others])
        after = label.scatter_reduce(0, ones, least, "amin").scatter_reduce(0, others, least, "amin")
        after = after[after]
        if torch.equal(after, label):
            break
        label = after
    numbers = label.unique(return_inverse=True)[1]
    return {axis: numbers[start : start + (size_of(axis) or 0)] for axis, start in first.items()}


def _group(axes: list[Axis], units: dict[Axis, torch.Tensor], pins: dict[Axis, str]) -> Group:
    consumers = [axis[0] for axis in axes if axis[0].op == "get_attr" and axis[1] == 1]
    readers = sorted(
        {
            user
            for weight in consumers
            for user in weight.users
            if is_call(user, xf.linear) and arguments(user)["weight"] is weight
        }
    )
    pinned = next((f"{_describe(axis)} must stay: {pins[axis]}" for axis in axes if axis in pins), None)
    return Group(
        kind=_kind(axes),
        units=1 + max(int(unit.max()) for unit in units.values()),
        values={(node.name, axis): units[node, axis] for node, axis in axes},
        parameters={(str(node.target), axis): units[node, axis] for node, axis in axes if node.op == "get_attr"},
        consumers=tuple(node.name for node in readers),
        path=_path(axes, readers),
        pinned=pinned,
    )


def _kind(axes: list[Axis]) -> Kind:
    last = [node for node, axis in axes if node.op == "call_function" and axis == rank(node) - 1]
    if any(_is_residual(node) for node in last):
        return "width"
    # behind a norm over all of them, what is left is not what was there
    if any(is_call(node, xf.layer_norm, xf.rms_norm) and arguments(node)["groups"] == 1 for node in last):
        return "other"
    if any(is_call(node, xf.attention) and axis == 2 for node, axis in axes):
        return "heads"
    if any(is_call(node, xf.activation, xf.glu) for node in last):
        return "hidden"
    return "other"


def _is_residual(node: fx.Node) -> bool:
    """Whether two computed values of one shape are added."""
    terms = [value for value in node.all_input_nodes if value.op == "call_function" and rank(value) == rank(node)]
    return is_call(node, aten.add.Tensor) and len(terms) == 2


def _path(axes: list[Axis], readers: list[fx.Node]) -> str:
    named = [*readers, *(node for node, _ in axes if node.op == "call_function")]
    return next((path_of(node) for node in named if path_of(node)), named[0].name if named else "")


def _describe(axis: Axis) -> str:
    node, position = axis
    name = str(node.target) if node.op == "get_attr" else f"%{node.name}"
    return f"axis {position} of {name}"
