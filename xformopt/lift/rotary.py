"""Lift rotary position embedding: which feature is paired with which, and with what sign, is read off a run."""

from __future__ import annotations

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.layout import find_heads, split_heads, take_channels
from xformopt.lift.probe import Probe, is_movement, movement_chain, operator_name
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["lift_rope"]

aten = torch.ops.aten
_SIGNED_MOVEMENT = ("neg", "cat", "stack")


def lift_rope(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """``x * cos + rotate(x) * sin`` per head becomes ``xf.rope`` on ``[B, T, C]`` followed by a split into heads.

    With a partial rotation, the sum is the first part of a ``cat`` with the untouched features.
    """
    if operator_name(node) == "cat":
        return _lift_partial(editor, node)
    if operator_name(node) != "add" or any(_is_partial(user, node) for user in node.users):
        return None
    terms = _read_sum(editor, node)
    if terms is None:
        return None
    return _emit(editor, node, *terms, whole=terms[0])


def _is_partial(user: fx.Node, rotated: fx.Node) -> bool:
    return operator_name(user) == "cat" and len(user.args[0]) == 2 and user.args[0][0] is rotated  # type: ignore[arg-type, index]


def _lift_partial(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    parts = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or axis not in (-1, 3) or operator_name(parts[0]) != "add":
        return None
    rotated, kept = parts
    assert isinstance(rotated, fx.Node)
    assert isinstance(kept, fx.Node)
    terms = _read_sum(editor, rotated)
    if terms is None:
        return None
    probe = Probe(editor.program)
    width = int(value_of(node).shape[-1])
    for whole in movement_chain(terms[0])[1:]:
        if not isinstance(whole.meta.get("val"), torch.Tensor) or value_of(whole).shape[-1] != width:
            continue
        first, rest = probe.moved(terms[0], whole), probe.moved(kept, whole)
        if first is not None and rest is not None and torch.equal(torch.cat([first, rest], -1), probe.positions(whole)):
            return _emit(editor, node, *terms, whole=whole)
    return Reject("the features that are not rotated do not follow those that are")


def _read_sum(editor: Editor, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """Read ``x * cos + rotate(x) * sin`` as (x, cos, sin, interleaved)."""
    if not all(operator_name(argument) == "mul" for argument in node.args) or len(node.args) != 2 or node.kwargs:
        return None
    for plain, turned in (node.args, node.args[::-1]):
        for x, cos in (plain.args, plain.args[::-1]):  # type: ignore[union-attr]
            for rotated, sin in (turned.args, turned.args[::-1]):  # type: ignore[union-attr]
                if not all(isinstance(part, fx.Node) for part in (x, cos, rotated, sin)):
                    continue
                if operator_name(rotated) in ("cat", "stack") or is_movement(rotated):
                    pairing = _pairing(editor, rotated, x)  # type: ignore[arg-type]
                    if pairing is not None:
                        return x, cos, sin, pairing  # type: ignore[return-value]
    return None


def _pairing(editor: Editor, rotated: fx.Node, x: fx.Node) -> bool | None:
    """Return whether ``rotated`` pairs neighbours (True) or halves (False) of x's features; None if neither."""
    value = value_of(x)
    if value.dim() != 4 or tuple(value_of(rotated).shape) != tuple(value.shape) or value.shape[-1] % 2:
        return None
    probe = Probe(editor.program)
    source = movement_chain(x)[-1]
    numbers = probe.positions(source) + 1
    own = probe.run(x, {source: numbers}, is_movement)
    turned = probe.run(rotated, {source: numbers}, _moves_with_sign)
    if not isinstance(own, torch.Tensor) or not isinstance(turned, torch.Tensor):
        return None
    half = own.shape[-1] // 2
    if torch.equal(turned, torch.cat([-own[..., half:], own[..., :half]], -1)):
        return False
    neighbours = torch.stack([-own[..., 1::2], own[..., 0::2]], -1).flatten(-2)
    return True if torch.equal(turned, neighbours) else None


def _moves_with_sign(node: fx.Node) -> bool:
    return is_movement(node) or operator_name(node) in _SIGNED_MOVEMENT


def _emit(
    editor: Editor, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool, whole: fx.Node
) -> fx.Node | Reject:
    """Rotate ``whole``, which is ``[B, H, T, D]`` or ``[B, T, H, D]``, on the value its heads come from."""
    probe = Probe(editor.program)
    heads, head_axis = find_heads(probe, whole, scaled=True), 1
    if heads is None:
        heads, head_axis = find_heads(probe, editor.call(aten.transpose.int, whole, 1, 2), scaled=True), 2
    if heads is None:
        return Reject("the rotated value is not the heads of a [B, T, C] value")
    tables = [_half_table(editor, table, interleaved, head_axis) for table in (cos, sin)]
    if any(isinstance(table, Reject) for table in tables):
        return Reject("the table of cosines or sines does not repeat each angle for both features of its pair")
    merged = take_channels(editor, heads)
    rope = xf.rope
    turned = editor.call(rope, merged, *tables, heads=heads.count, interleaved=interleaved)
    parts = split_heads(editor, turned, heads.count)
    if heads.factor != 1.0:
        # a rotation is linear: what scales queries before it does so after it
        parts = editor.call(aten.mul.Tensor, parts, heads.factor)
    return parts if head_axis == 1 else editor.call(aten.transpose.int, parts, 1, 2)


def _half_table(editor: Editor, table: fx.Node, interleaved: bool, head_axis: int) -> fx.Node | Reject:
    """Return the ``[B or 1, T, R / 2]`` table behind one that repeats every angle for both features of a pair."""
    for source in movement_chain(table):
        if not isinstance(source.meta.get("val"), torch.Tensor):
            continue
        if value_of(source).dim() == 2 and source is table:
            source = editor.call(aten.unsqueeze.default, source, 0)
        elif value_of(source).dim() != 3 or not _inserts_axis(editor, table, source, head_axis):
            continue
        if _repeats(editor, source, interleaved):
            return _first_of_pairs(editor, source, interleaved)
    if value_of(table).dim() != 4 or value_of(table).shape[head_axis] != 1:
        return Reject("no table for all heads")
    if not _spreads(editor, table, interleaved) and not _repeats(editor, table, interleaved):
        return Reject("no table of half the width")
    return _first_of_pairs(editor, editor.call(aten.select.int, table, head_axis, 0), interleaved)


def _first_of_pairs(editor: Editor, table: fx.Node, interleaved: bool) -> fx.Node:
    width = int(value_of(table).shape[-1])
    end, step = (width, 2) if interleaved else (width // 2, 1)
    return editor.call(aten.slice.Tensor, table, 2, 0, end, step)


def _spreads(editor: Editor, table: fx.Node, interleaved: bool) -> bool:
    """Whether ``table`` only moves a smaller one, each element of which goes to both features of a pair."""
    roots, pending = set[fx.Node](), [table]
    while pending:
        node = pending.pop()
        if operator_name(node) in ("cat", "stack"):
            pending.extend(node.all_input_nodes)
        elif is_movement(node):
            pending.append(node.all_input_nodes[0])
        else:
            roots.add(node)
    if len(roots) != 1 or not isinstance((root := roots.pop()).meta.get("val"), torch.Tensor):
        return False
    probe = Probe(editor.program)
    moved = probe.run(table, {root: probe.positions(root)}, _moves_with_sign)
    return isinstance(moved, torch.Tensor) and _in_pairs(moved, interleaved)


def _inserts_axis(editor: Editor, table: fx.Node, source: fx.Node, axis: int) -> bool:
    moved = Probe(editor.program).moved(table, source)
    if moved is None or moved.dim() != 4 or moved.shape[axis] != 1:
        return False
    return torch.equal(moved.reshape(-1), torch.arange(moved.numel()))


def _repeats(editor: Editor, table: fx.Node, interleaved: bool) -> bool:
    probe = Probe(editor.program)
    known = {
        node: torch.arange(torch.Size(probe.shape(node)).numel()).view(probe.shape(node)).to(value_of(node).dtype)
        for node in editor.program.graph.find_nodes(op="placeholder")
        if not value_of(node).is_floating_point()
    }
    values = probe.run(table, known)
    if not isinstance(values, torch.Tensor):
        return False
    return _in_pairs(values, interleaved)


def _in_pairs(values: torch.Tensor, interleaved: bool) -> bool:
    half = values.shape[-1] // 2
    first, second = (values[..., 0::2], values[..., 1::2]) if interleaved else (values[..., :half], values[..., half:])
    return torch.equal(first, second)
