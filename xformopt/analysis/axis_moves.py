"""Links of the ATen operators that move, cut, join or reduce axes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from xformopt.analysis.links import Links, rank, size_of, sizes
from xformopt.match import arguments
from xformopt.program.text import target_name

__all__ = ["MOVES", "SPLITS"]

aten = torch.ops.aten
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})


def _axis_of(node: fx.Node, among: int | None = None) -> int:
    """Return the axis that the operator names, one of ``among`` (those of the result)."""
    return int(arguments(node)["dim"]) % (among or rank(node))


def _cat(links: Links, node: fx.Node) -> None:
    dim, start = _axis_of(node), 0
    is_counted = size_of((node, dim)) is not None
    for part in arguments(node)["tensors"]:
        for axis in range(rank(node)):
            if axis != dim:
                links.equal((part, axis), (node, axis))
        if is_counted:
            links.part((node, dim), (part, dim), start)
            start += int(sizes(part)[dim])


def _slice(links: Links, node: fx.Node) -> None:
    given, dim = arguments(node), _axis_of(node)
    x = given["self"]
    for axis in range(rank(node)):
        if axis != dim:
            links.equal((x, axis), (node, axis))
    size = size_of((x, dim))
    if size is None or given["step"] != 1 or not all(isinstance(given[end], int | None) for end in ("start", "end")):
        links.pin(x, dim, f"%{node.name} takes entries of it by their number")
        links.pin(node, dim, f"%{node.name} takes entries by their number")
        return
    start = given["start"] or 0
    links.part((x, dim), (node, dim), min(max(start + size if start < 0 else start, 0), size))


def _index(links: Links, node: fx.Node) -> None:
    """Rows looked up by one tensor of numbers: what is behind the rows stays in place."""
    given = arguments(node)
    x, indices = given["self"], given["indices"]
    if len(indices) != 1 or not isinstance(indices[0], fx.Node):
        for value in (*node.all_input_nodes, node):
            links.pin_all(value, f"%{node.name} takes entries by several numbers")
        return
    links.pin(x, 0, f"%{node.name} takes entries of it by their number")
    for axis in range(rank(indices[0])):
        links.equal((indices[0], axis), (node, axis))
    for axis in range(1, rank(x)):
        links.equal((x, axis), (node, axis + rank(indices[0]) - 1))


def _select(links: Links, node: fx.Node) -> None:
    x = arguments(node)["self"]
    dim = _axis_of(node, rank(x))
    links.pin(x, dim, f"%{node.name} takes an entry of it by its number")
    for axis in range(rank(node)):
        links.equal((x, axis + (axis >= dim)), (node, axis))


def _split(links: Links, node: fx.Node) -> None:
    """Nothing to do: the parts are linked where they are taken out."""


def _getitem(links: Links, node: fx.Node) -> None:
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    if source.target not in SPLITS:
        for value in (*source.all_input_nodes, node):
            links.pin_all(value, f"{target_name(source.target)} (%{source.name}) has several results")
        return
    x = arguments(source)["self"]
    dim = _axis_of(source, rank(x))
    sizes = [part.shape[dim] for part in source.meta["val"]]
    for axis in range(rank(node)):
        if axis != dim:
            links.equal((x, axis), (node, axis))
        elif all(isinstance(size, int) for size in sizes):
            links.part((x, dim), (node, dim), sum(sizes[:index]))


def _permute(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    x, order = given["self"], given.get("dims")
    if order is None:
        order = list(range(rank(x)))
        one, other = given["dim0"], given["dim1"]
        order[one], order[other] = order[other], order[one]
    for axis, source in enumerate(order):
        links.equal((x, source % rank(x)), (node, axis))


def _unsqueeze(links: Links, node: fx.Node) -> None:
    dim = _axis_of(node)
    x = arguments(node)["self"]
    for axis in range(rank(x)):
        links.equal((x, axis), (node, axis + (axis >= dim)))


def _mean(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    x = given["self"]
    reduced = {axis % rank(x) for axis in (given["dim"] or range(rank(x)))}
    kept = [axis for axis in range(rank(x)) if given["keepdim"] or axis not in reduced]
    for axis in reduced:
        links.pin(x, axis, f"%{node.name} takes the mean or sum over it")
    for position, axis in enumerate(kept):
        if axis not in reduced:
            links.equal((x, axis), (node, position))


def _roll(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    x = given["self"]
    moved = {axis % rank(node) for axis in given["dims"]} or set(range(rank(node)))
    for axis in range(rank(node)):
        if axis in moved:
            links.pin(x, axis, f"%{node.name} shifts its entries")
            links.pin(node, axis, f"%{node.name} shifts its entries")
        else:
            links.equal((x, axis), (node, axis))


def _reshape(links: Links, node: fx.Node) -> None:
    """Axes that keep their size are linked; of axes that are split or joined, the outermost links whole parts."""
    x = arguments(node)["self"]
    for sources, targets in _matched(list(sizes(x)), list(sizes(node))):
        outer, inner = (x, sources), (node, targets)
        if len(sources) == 1 and len(targets) == 1:
            links.equal((x, sources[0]), (node, targets[0]))
            continue
        if len(targets) == 1:
            outer, inner = inner, outer
        whole, parts = outer[1], inner[1]
        if len(whole) == 1 and size_of((outer[0], whole[0])) is not None and size_of((inner[0], parts[0])) is not None:
            links.blocks((outer[0], whole[0]), (inner[0], parts[0]), int(sizes(inner[0])[parts[0]]))
            parts = parts[1:]
            whole = []
        for value, axes in ((outer[0], whole), (inner[0], parts)):
            for axis in axes:
                links.pin(value, axis, f"%{node.name} mixes it with other axes")


def _matched(sources: list[Any], targets: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of axes of equal product, shortest first; axes of one entry belong to none."""
    groups: list[tuple[list[int], list[int]]] = []
    left = [axis for axis, size in enumerate(sources) if not (isinstance(size, int) and size == 1)]
    right = [axis for axis, size in enumerate(targets) if not (isinstance(size, int) and size == 1)]
    while left and right:
        ones, others = [left.pop(0)], [right.pop(0)]
        one, other = sources[ones[0]], targets[others[0]]
        while not _same(one, other):
            if left and (not right or _hint(one) <= _hint(other)):
                ones.append(left.pop(0))
                one = one * sources[ones[-1]]
            elif right:
                others.append(right.pop(0))
                other = other * targets[others[-1]]
            else:
                break
        groups.append((ones, others))
    return groups


def _same(one: Any, other: Any) -> bool:
    symbolic = [getattr(getattr(size, "node", None), "expr", size) for size in (one, other)]
    return bool(symbolic[0] == symbolic[1])


def _hint(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)


MOVES: dict[object, Callable[[Links, fx.Node], None]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.select.int: _select,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.mean.dim: _mean,
    aten.sum.dim_IntList: _mean,
    aten.roll.default: _roll,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.sym_size.int: _split,
    operator.getitem: _getitem,
    **dict.fromkeys(SPLITS, _split),
}
