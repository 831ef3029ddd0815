"""What ties the entries of one axis to those of another.

An axis is a value of the graph and a position in its shape.  Two axes are *linked* where entry i of one can only be
removed together with entry j of the other: a linear layer links its input's last axis to its weight's columns.  An axis
is *pinned* where nothing may remove its entries, because they are counted, indexed or returned.  Dynamic axes (batch,
length) have no entries of their own and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

__all__ = ["Axis", "Link", "Links", "rank", "size_of", "sizes"]

# a value's node and a position in its shape
Axis: TypeAlias = tuple[fx.Node, int]


@dataclass(frozen=True)
class Link:
    """Entry ``one_entries[i]`` of axis ``one`` goes with entry ``other_entries[i]`` of axis ``other``."""

    one: Axis
    other: Axis
    one_entries: torch.Tensor
    other_entries: torch.Tensor


@dataclass
class Links:
    """What the operators of a program link and pin.

    Attributes:
        found: The links, in execution order.
        pins: Why the entries of an axis must stay, by axis.

    """

    found: list[Link] = field(default_factory=list)
    pins: dict[Axis, str] = field(default_factory=dict)

    def equal(self, one: Axis, other: Axis) -> None:
        """Link two axes entry by entry; where one has a single entry it is broadcast, which links nothing."""
        size = size_of(one)
        if size is not None and size > 1 and size == size_of(other):
            self.found.append(Link(one, other, torch.arange(size), torch.arange(size)))

    def blocks(self, one: Axis, other: Axis, count: int) -> None:
        """Link two axes in ``count`` equal parts, each of which goes as a whole."""
        wide, narrow = size_of(one), size_of(other)
        if wide is None or narrow is None:
            return
        entries, others = torch.arange(wide), torch.arange(narrow)
        into = entries // (wide // count) * (narrow // count)
        back = others // (narrow // count) * (wide // count)
        self.found.append(Link(one, other, torch.cat([entries, back]), torch.cat([into, others])))

    def part(self, whole: Axis, part: Axis, start: int) -> None:
        """Link all of ``part`` to the entries of ``whole`` from ``start`` on."""
        size = size_of(part)
        if size is not None and size_of(whole) is not None:
            self.found.append(Link(whole, part, torch.arange(start, start + size), torch.arange(size)))

    def pin(self, node: fx.Node, axis: int, reason: str) -> None:
        """Keep all entries of an axis."""
        if size_of((node, axis)) is not None:
            self.pins.setdefault((node, axis), reason)

    def pin_all(self, node: fx.Node, reason: str) -> None:
        """Keep all entries of every axis of a value."""
        for axis in range(rank(node)):
            self.pin(node, axis, reason)


def sizes(node: fx.Node) -> Sequence[Any]:
    """Return the shape of a node's value, numbers or symbols; empty for what is no tensor."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def rank(node: fx.Node) -> int:
    """Return how many axes a node's value has."""
    return len(sizes(node))


def size_of(axis: Axis) -> int | None:
    """Return how many entries an axis has; None for a dynamic one."""
    size = sizes(axis[0])[axis[1]]
    return size if isinstance(size, int) else None
