"""Lift linear layers: every spelling of ``x W + b``, on ``[B, T, C]`` however the rows were flattened for it."""

from __future__ import annotations

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.probe import Probe, is_movement, movement_chain, operator_name
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = [
    "add_bias",
    "drop_empty_parts",
    "lift_einsum",
    "lift_linear",
    "restore_rows",
    "split_linear",
    "undo_movement",
]

aten = torch.ops.aten


def drop_empty_parts(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Empty parts of a ``cat`` are left out."""
    if operator_name(node) != "cat" or len(node.all_input_nodes) != len(node.args[0]):  # type: ignore[arg-type]
        return None
    parts = node.all_input_nodes
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    filled = [
        part for part in parts if value_of(part).dim() == value_of(node).dim() and value_of(part).shape[axis] != 0
    ]
    if not filled or len(filled) == len(parts):
        return None
    return filled[0] if len(filled) == 1 else editor.call(aten.cat.default, filled, axis)


def lift_einsum(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """A product of two tensors over one index becomes ``matmul`` between transpositions."""
    if operator_name(node) != "einsum":
        return None
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, list | tuple)
    inputs, _, output = equation.replace(" ", "").partition("->")
    indices = inputs.split(",")
    if len(indices) != 2 or not output or "." in equation or any(len(set(i)) != len(i) for i in (*indices, output)):
        return Reject(f"the einsum {equation} is not a plain product of two tensors")
    left, right = indices
    batch = [i for i in output if i in left and i in right]
    summed = [i for i in left if i in right and i not in output]
    rows, columns = ([i for i in part if i not in batch and i in output] for part in (left, right))
    if (
        len(rows) != 1
        or len(columns) != 1
        or len(summed) != 1
        or len(batch) + 2 != len(left)
        or len(left) != len(right)
    ):
        return Reject(f"the einsum {equation} has no single row, column and summed index")
    first = editor.call(aten.permute.default, operands[0], [left.index(i) for i in (*batch, *rows, *summed)])
    second = editor.call(aten.permute.default, operands[1], [right.index(i) for i in (*batch, *summed, *columns)])
    product = editor.call(aten.matmul.default, first, second)
    order = [*batch, *rows, *columns]
    return editor.call(aten.permute.default, product, [order.index(i) for i in output])


def lift_linear(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``linear``, ``addmm``, ``mm``, and ``matmul`` with a constant matrix, become ``xf.linear``."""
    name = operator_name(node)
    linear = xf.linear
    if name == "linear" and node.target is not linear:
        return editor.call(linear, *node.args)
    if name == "addmm" and not node.kwargs:
        bias, x, matrix = node.args
        weight = _weight(editor, matrix)
        if weight is None or value_of(bias).dim() != 1:  # type: ignore[arg-type]
            return None
        return editor.call(linear, x, weight, bias)
    if name in ("mm", "matmul"):
        x, matrix = node.args
        weight = _weight(editor, matrix)
        return None if weight is None else editor.call(linear, x, weight)
    return None


def _weight(editor: Editor, matrix: object) -> fx.Node | None:
    """Return the ``[O, I]`` weight behind a constant ``[I, O]`` matrix."""
    if not isinstance(matrix, fx.Node) or value_of(matrix).dim() != 2:
        return None
    if operator_name(matrix) in ("t", "transpose", "permute", "numpy_T", "mT"):
        inner = matrix.args[0]
        return inner if editor.constant(inner) is not None else None  # type: ignore[return-value]
    value = editor.constant(matrix)
    if value is None:
        return None
    return editor.parameter(f"{matrix.target}_transposed", value.t().contiguous())


def add_bias(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``xf.linear(x, W) + b`` with a constant vector b becomes one linear."""
    if operator_name(node) != "add" or node.kwargs:
        return None
    for product, bias in (node.args, node.args[::-1]):
        if not isinstance(product, fx.Node) or product.target is not xf.linear:
            continue
        vector = editor.constant(bias)
        width = value_of(product).shape[-1]
        if len(product.args) == 2 and len(product.users) == 1 and vector is not None and vector.shape == (width,):
            return editor.call(product.target, *product.args, bias)
    return None


def restore_rows(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Undo flattening and transposing of rows around a linear layer: it acts on the last axis alone."""
    if not is_movement(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    chain = movement_chain(node)
    linear = chain[-1]
    if linear.target is not xf.linear or not is_movement(linear.args[0]):
        return None
    probe = Probe(editor.program)
    moved = probe.moved(node, linear)
    width = int(value_of(linear).shape[-1])
    if moved is None or moved.shape[-1] != width or not _rows_only(moved, width):
        return None
    wanted = _shape(editor, node)[:-1]
    for source in reversed(movement_chain(linear.args[0])[1:]):  # type: ignore[arg-type]
        have = _shape(editor, source)[:-1]
        if wanted not in (have, have[::-1]):
            continue
        before = probe.moved(linear.args[0], source)  # type: ignore[arg-type]
        inner = int(value_of(source).shape[-1])
        if before is None or before.shape[-1] != inner or not _rows_only(before, inner):
            continue
        rows = (before[..., 0] // inner).reshape(-1)[moved[..., 0].reshape(-1) // width]
        numbers = torch.arange(rows.numel())
        if wanted == have and torch.equal(rows, numbers):
            return editor.call(linear.target, source, *linear.args[1:])
        if len(have) == 2 and torch.equal(rows, numbers.view(probe.shape(source)[:-1]).t().reshape(-1)):
            return editor.call(aten.transpose.int, editor.call(linear.target, source, *linear.args[1:]), 0, 1)
    return None


def _rows_only(moved: torch.Tensor, width: int) -> bool:
    """Whether the last axis is whole rows of the source in order."""
    return torch.equal(moved % width, torch.arange(width).expand_as(moved))


def _shape(editor: Editor, node: fx.Node) -> tuple[object, ...]:
    value = node.meta.get("val")
    return editor.program.dims.shape(value) if isinstance(value, torch.Tensor) else ()


def _ends_chain(node: fx.Node) -> bool:
    """Whether ``node`` is the last movement of a chain: something computes with it."""
    return is_movement(node) and any(not is_movement(user) for user in node.users)


def undo_movement(editor: Editor, node: fx.Node) -> fx.Node | None:
    """A chain of movements that brings every element back where it was is no operation."""
    if not _ends_chain(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    probe = Probe(editor.program)
    for source in reversed(movement_chain(node)[1:]):
        if not isinstance(source.meta.get("val"), torch.Tensor) or _shape(editor, source) != _shape(editor, node):
            continue
        moved = probe.moved(node, source)
        if moved is not None and torch.equal(moved.reshape(-1), torch.arange(moved.numel())):
            return source
    return None


def split_linear(editor: Editor, node: fx.Node) -> fx.Node | None:
    """A slice of a linear layer's channels is a linear layer with a slice of its weight, if every reader slices."""
    if not is_movement(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    source = movement_chain(node)[-1]
    if source.target is not xf.linear or _shape(editor, node)[:-1] != _shape(editor, source)[:-1]:
        return None
    if _shape(editor, node) == _shape(editor, source) or not all(is_movement(user) for user in source.users):
        return None
    moved = Probe(editor.program).moved(node, source)
    width = int(value_of(source).shape[-1])
    if moved is None or not torch.equal(moved[..., :1] // width, _row_numbers(moved)):
        return None
    channels = moved.reshape(-1, moved.shape[-1])[0]
    if not torch.equal(moved % width, channels.expand_as(moved)):
        return None
    return _slice_linear(editor, source, channels)


def _row_numbers(moved: torch.Tensor) -> torch.Tensor:
    return torch.arange(moved[..., :1].numel()).view(moved[..., :1].shape)


def _slice_linear(editor: Editor, linear: fx.Node, channels: torch.Tensor) -> fx.Node | None:
    suffix = f"_{int(channels[0])}_{int(channels[-1]) + 1}"
    arguments = []
    for argument in linear.args[1:]:
        value = editor.constant(argument)
        if argument is not None and value is None:
            return None
        if value is not None:
            arguments.append(editor.parameter(f"{argument.target}{suffix}", value[channels].contiguous()))  # type: ignore[union-attr]
    return editor.call(linear.target, linear.args[0], *arguments)
