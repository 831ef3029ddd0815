"""Rules that replace one spelling of an operation by the canonical one."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, operand
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = [
    "count_axes_from_left",
    "spell_cast",
    "spell_part_as_slice",
    "spell_scalar_operand",
    "spell_slice",
    "spell_transpose_as_permute",
]

aten = torch.ops.aten

_TRANSPOSES = frozenset(
    {
        aten.t.default,
        aten.mT.default,
        aten.numpy_T.default,
        aten.transpose.int,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.movedim.int,
        aten.movedim.intlist,
    }
)
_SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.chunk.default,
        aten.unsafe_chunk.default,
        aten.tensor_split.sections,
        aten.unbind.int,
    }
)
_CASTS = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten.type_as.default,
        torch.ops.prims.convert_element_type.default,
    }
)
_TENSOR_FORMS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
_SCALAR_FORMS = {
    aten.pow.Tensor_Tensor: aten.pow.Tensor_Scalar,
    aten.masked_fill.Tensor: aten.masked_fill.Scalar,
    aten.eq.Tensor: aten.eq.Scalar,
    aten.ne.Tensor: aten.ne.Scalar,
    aten.lt.Tensor: aten.lt.Scalar,
    aten.le.Tensor: aten.le.Scalar,
    aten.gt.Tensor: aten.gt.Scalar,
    aten.ge.Tensor: aten.ge.Scalar,
} | {target: target for target in _TENSOR_FORMS.values()}
_AXES = ("dim", "dims", "dim0", "dim1", "dim2", "start_dim", "end_dim")
# these count the axes of their result, which has one more than their input
_ADDS_AXIS = frozenset({aten.unsqueeze.default, aten.stack.default})


def spell_transpose_as_permute(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``transpose``, ``t``, ``mT``, ``movedim`` and the like become ``permute``."""
    if node.target not in _TRANSPOSES or not callable(node.target):
        return None
    source = operand(node)
    # sizes that differ tell which axis went where, whatever the operator's own way to say it
    marked = torch.empty([2 + axis for axis in range(value_of(source).dim())], device="meta")
    moved = node.target(marked, *node.args[1:], **node.kwargs)
    return editor.call(aten.permute.default, source, [size - 2 for size in moved.shape])


def spell_part_as_slice(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """One of the parts of ``split``, ``chunk`` or ``unbind`` is a ``slice`` or ``select`` of the whole."""
    if is_call(node, aten.narrow.default):
        source, axis, start, length = node.args
        if not isinstance(start, int) or not isinstance(length, int):
            return Reject("the bounds of narrow vary")
        return editor.call(aten.slice.Tensor, source, axis, start, start + length)
    if node.target is not operator.getitem or not is_call(whole := node.args[0], *_SPLITS):
        return None
    given = arguments(whole)
    source, axis, parts = given["self"], given["dim"], whole.meta["val"]
    index = range(len(parts))[node.args[1]]  # type: ignore[index]
    if whole.target is aten.unbind.int:
        return editor.call(aten.select.int, source, axis, index)
    sizes = [editor.program.dims.expression(part.shape[axis]) for part in parts[: index + 1]]
    start = sum(sizes[:-1])
    if not isinstance(start, int) or not isinstance(sizes[-1], int):
        return Reject("the sizes of the parts vary")
    return editor.call(aten.slice.Tensor, source, axis, start, start + sizes[-1])


def spell_slice(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Bounds are counted from the left, and stated where they are known."""
    if not is_call(node, aten.slice.Tensor):
        return None
    given = arguments(node)
    source, axis, step = given["self"], given["dim"], given["step"]
    size = editor.program.dims.expression(value_of(source).shape[axis])
    start = _bound(given["start"], 0, size)
    end = _bound(given["end"], sys.maxsize, size)
    if (start, end) == (given["start"], given["end"]):
        return None
    steps = () if step == 1 else (step,)
    return editor.call(aten.slice.Tensor, source, axis, start, end, *steps)


def _bound(given: Any, default: int, size: Any) -> Any:
    bound = default if given is None else given
    if not isinstance(bound, int) or not isinstance(size, int):
        return bound
    return min(max(bound + size if bound < 0 else bound, 0), size)


def spell_cast(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """``to``, ``type_as`` and ``convert_element_type`` become ``_to_copy`` with nothing but a dtype."""
    if node.target not in _CASTS:
        return None
    source = operand(node)
    value = value_of(node)
    if value.device != value_of(source).device:
        return Reject(f"moves the value from {value_of(source).device} to {value.device}")
    stated = {name for name, argument in arguments(node).items() if argument not in (None, False)}
    if node.target is aten._to_copy.default and stated <= {"self", "dtype"}:
        return None
    return editor.call(aten._to_copy.default, source, dtype=value.dtype)


def spell_scalar_operand(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """``add.Scalar(x, 2)`` becomes ``add.Tensor(x, 2)``, and a parameter without axes becomes its number."""
    if node.target in _TENSOR_FORMS:
        given = arguments(node)
        scale: dict[str, Any] = {"alpha": given["alpha"]} if given.get("alpha", 1) != 1 else {}
        return editor.call(_TENSOR_FORMS[node.target], given["self"], given["other"], **scale)
    if node.target not in _SCALAR_FORMS:
        return None
    *before, last = node.args
    constant = editor.constant(last)
    if constant is None or constant.dim() or constant.isnan():
        return None
    keywords: dict[str, Any] = dict(node.kwargs)
    spelled = editor.call(_SCALAR_FORMS[node.target], *before, constant.item(), **keywords)
    if value_of(spelled).dtype != value_of(node).dtype:
        return Reject(f"as a number, the operand would make the result {value_of(spelled).dtype}")
    return spelled


def count_axes_from_left(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Axis -1 of a value with three axes is axis 2."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    given = arguments(node)
    if not any(_is_negative(given.get(name)) for name in _AXES):
        return None
    first = next((argument for argument in node.all_input_nodes if "val" in argument.meta), None)
    if first is None or not isinstance(first.meta["val"], torch.Tensor):
        return None
    rank = value_of(first).dim() + (node.target in _ADDS_AXIS)
    counted = {name: _count(given[name], rank) for name in _AXES if name in given}
    if not rank or any(_is_negative(axes) for axes in counted.values()):
        return None
    return call_with(editor, node, **counted)


def _is_negative(axes: object) -> bool:
    if isinstance(axes, list | tuple):
        return any(_is_negative(axis) for axis in axes)
    return isinstance(axes, int) and axes < 0


def _count(axes: Any, rank: int) -> Any:
    if isinstance(axes, list | tuple):
        return [_count(axis, rank) for axis in axes]
    return axes + rank if isinstance(axes, int) and axes < 0 else axes
