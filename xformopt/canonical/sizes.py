"""Rules about the sizes that operators are given: numbers where known, else from the operator's own input.

A size read from an input of the program would fix every later value to it.  Where it comes from the value that is
reshaped, a change of the number of tokens in the middle of a model stays local.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand
from xformopt.program import Shape, shape_of
from xformopt.rewrite import Editor, Reject

__all__ = ["local_sizes", "localize_expand", "localize_reshape", "spell_reshape", "use_static_sizes"]

aten = torch.ops.aten

_VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape_as.default,
        aten.view_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)
_EXPANDS = frozenset({aten.expand.default, aten.expand_as.default, aten.broadcast_to.default})


def use_static_sizes(editor: Editor, node: fx.Node) -> fx.Node | None:
    """An argument whose size is known becomes the number."""
    known = {a: size for a in node.all_input_nodes if (size := _static_size(editor, a)) is not None}
    if not known:
        return None
    args = fx.map_arg(node.args, lambda argument: known.get(argument, argument))
    kwargs: dict[str, Any] = fx.map_arg(node.kwargs, lambda argument: known.get(argument, argument))
    return editor.call(node.target, *args, **kwargs)


def _static_size(editor: Editor, node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        value = editor.program.dims.expression(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def localize_reshape(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """Every view becomes a ``reshape`` whose sizes are numbers, one -1, and sizes of its own input."""
    if node.target not in _VIEWS:
        return None
    source = operand(node)
    sizes = local_sizes(editor, source, node)
    if is_call(node, aten.view.default, aten._unsafe_view.default):
        return editor.call(aten.reshape.default, source, node.args[1] if sizes is None else sizes)
    if sizes is None:
        return Reject("more than one of the sizes cannot be told from the input's")
    if is_call(node, aten.reshape.default) and _plain(sizes) == _plain(node.args[1]):
        return None
    return editor.call(aten.reshape.default, source, sizes)


def spell_reshape(editor: Editor, source: fx.Node, like: fx.Node) -> fx.Node | None:
    """Reshape ``source`` to the shape of ``like``, in its place; None where local sizes cannot say it."""
    sizes = local_sizes(editor, source, like)
    return None if sizes is None else editor.call(aten.reshape.default, source, sizes)


def local_sizes(editor: Editor, source: fx.Node, like: fx.Node) -> list[int | fx.Node] | None:
    """Express the shape of ``like``, which is being replaced, by numbers, at most one -1, and sizes of ``source``.

    Returns None where that does not suffice.
    """
    shape = shape_of(editor.program, like)
    dynamic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    # with an empty axis, -1 could be anything
    if dynamic and 0 in shape:
        return None
    origins = _match_axes(shape_of(editor.program, source), shape)
    unknown = [axis for axis in dynamic if origins[axis] is None]
    if len(unknown) > 1:
        return None
    inferred = unknown[0] if unknown else dynamic[-1] if dynamic else None
    sizes: list[int | fx.Node] = []
    for axis, size in enumerate(shape):
        origin = origins[axis]
        if isinstance(size, int):
            sizes.append(size)
        elif axis == inferred:
            sizes.append(-1)
        else:
            assert origin is not None
            sizes.append(_size_of(editor, source, origin, like))
    return sizes


def _match_axes(have: Shape, wanted: Shape) -> list[int | None]:
    """Find for every wanted size the axis that has it: in order where possible, else the first."""
    found: list[int | None] = []
    following = 0
    for size in wanted:
        in_order = next((axis for axis in range(following, len(have)) if have[axis] == size), None)
        axis = in_order if in_order is not None else next((a for a, s in enumerate(have) if s == size), None)
        found.append(axis)
        following = following if axis is None else axis + 1
    return found


def _size_of(editor: Editor, source: fx.Node, axis: int, root: fx.Node) -> fx.Node:
    """Return a node before ``root`` that reads the size of an axis: an old one if there is one."""
    for reader in source.users:
        if is_call(reader, aten.sym_size.int) and arguments(reader)["dim"] == axis and reader < root:
            return reader
    return editor.call(aten.sym_size.int, source, axis)


def _plain(value: Any) -> Any:
    """Make sizes comparable: two nodes that read the same size are equal."""
    if is_call(value, aten.sym_size.int):
        return (value.args[0], arguments(value)["dim"])
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def localize_expand(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Sizes that an ``expand`` keeps are written -1."""
    if node.target not in _EXPANDS:
        return None
    source = operand(node)
    before, after = shape_of(editor.program, source), shape_of(editor.program, node)
    new_axes = len(after) - len(before)
    given = _given_sizes(editor, node)
    sizes = [
        -1 if axis >= new_axes and before[axis - new_axes] == size else _number_or(size, given[axis])
        for axis, size in enumerate(after)
    ]
    if is_call(node, aten.expand.default) and sizes == list(given):
        return None
    return editor.call(aten.expand.default, source, sizes)


def _number_or(size: object, given: object) -> Any:
    return size if isinstance(size, int) else given


def _given_sizes(editor: Editor, node: fx.Node) -> Sequence[Any]:
    if not is_call(node, aten.expand_as.default):
        return node.args[1]  # type: ignore[return-value]
    like = operand(node, 1)
    return [
        size if isinstance(size, int) else _size_of(editor, like, axis, node)
        for axis, size in enumerate(shape_of(editor.program, like))
    ]
