"""Rules that remove what changes nothing, and compose what follows each other."""

from __future__ import annotations

import torch
from torch import fx

from xformopt.canonical.sizes import spell_reshape
from xformopt.match import arguments, is_call, is_returned, operand
from xformopt.program import shape_of, value_of
from xformopt.rewrite import Editor, Reject

__all__ = [
    "compose_expands",
    "compose_permutes",
    "compose_reshapes",
    "remove_copy",
    "remove_identity_arithmetic",
    "remove_identity_cast",
    "remove_identity_movement",
]

aten = torch.ops.aten

_COPIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.positive.default,
        aten.resolve_conj.default,
        aten.resolve_neg.default,
    }
)
_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
# these fail on, or mean something else for, a value with another memory layout
_STRIDED_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.view_as.default)
_STRIDE_READERS = (aten.as_strided.default, aten.view.dtype)
# where one of these keeps the shape, it keeps every element in its place
_SHAPE_ONLY = frozenset(
    {
        aten._unsafe_view.default,
        aten.broadcast_to.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.flatten.using_ints,
        aten.repeat.default,
        aten.reshape.default,
        aten.reshape_as.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
        aten.view.default,
        aten.view_as.default,
    }
)
_CONTENT = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.other, aten.type_as.default})
_NEUTRAL = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
    aten.pow.Tensor_Scalar: 1,
}
_COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})
_RESHAPES = frozenset(
    {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
)


def remove_copy(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """Copies, aliases and inactive dropout: ``clone(x) -> x``."""
    if node.target in _DROPOUTS:
        given = arguments(node)
        if given["train"] and given["p"]:
            return Reject("drops values at random: the model was captured in training mode")
    elif node.target not in _COPIES:
        return None
    source = operand(node)
    find = editor.program.graph.find_nodes
    if any(find(op="call_function", target=target, sort=False) for target in _STRIDED_VIEWS):
        # a view may hold only because of this copy's layout; the same sweep turns views into reshapes
        return None
    if any(find(op="call_function", target=target, sort=False) for target in _STRIDE_READERS):
        return Reject("the program reads memory layouts (as_strided), which copies fix")
    if is_returned(node) and source.op != "call_function":
        return Reject(f"the result would be {source.target} itself, not a copy of it")
    return source


def remove_identity_movement(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Views, broadcasts, slices and paddings that keep the shape: ``reshape(x, shape of x) -> x``."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if not _keeps_places(node) or shape_of(editor.program, source) != shape_of(editor.program, node):
        return None
    return source


def _keeps_places(node: fx.Node) -> bool:
    """Whether ``node`` moves nothing provided that it keeps the shape."""
    if node.target in _SHAPE_ONLY:
        return True
    given = arguments(node)
    if is_call(node, aten.slice.Tensor):
        return bool(given["step"] == 1)
    if is_call(node, aten.constant_pad_nd.default):
        return all(isinstance(amount, int) and amount == 0 for amount in given["pad"])
    return False


def remove_identity_cast(editor: Editor, node: fx.Node) -> fx.Node | None:
    """A cast to the same dtype on the same device: ``_to_copy(x, dtype of x) -> x``."""
    if node.target not in _CONTENT:
        return None
    source = operand(node)
    before, after = value_of(source), value_of(node)
    return source if (before.dtype, before.device) == (after.dtype, after.device) else None


def remove_identity_arithmetic(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """``x + 0``, ``x - 0``, ``x * 1``, ``x / 1`` and ``x ** 1``."""
    if node.target not in _NEUTRAL:
        return None
    orders = [node.args[:2], node.args[1::-1]] if node.target in _COMMUTATIVE else [node.args[:2]]
    for source, number in orders:
        if isinstance(source, fx.Node) and _is_number(number) and number == _NEUTRAL[node.target]:
            if value_of(source).dtype != value_of(node).dtype:
                return Reject(f"also casts {value_of(source).dtype} to {value_of(node).dtype}")
            return source
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def compose_permutes(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``permute(permute(x, a), b) -> permute(x, a[b])``, and no permute where that is the identity."""
    if not is_call(node, aten.permute.default):
        return None
    source, order = operand(node), _order(node)
    inner = is_call(source, aten.permute.default)
    if inner:
        before = _order(source)
        source, order = operand(source), [before[axis] for axis in order]
    if order == list(range(len(order))):
        return source
    return editor.call(aten.permute.default, source, order) if inner else None


def _order(permute: fx.Node) -> list[int]:
    dims: list[int] = list(arguments(permute)["dims"])
    return [axis % len(dims) for axis in dims]


def compose_reshapes(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``reshape(reshape(x, a), b) -> reshape(x, b)``; axes of size 1 that come or go are reshapes, too."""
    if not is_call(node, *_RESHAPES) or not is_call(source := node.args[0], *_RESHAPES):
        return None
    origin = operand(source)
    if shape_of(editor.program, origin) == shape_of(editor.program, node):
        return origin
    # an unsqueeze says more than a reshape: only reshapes absorb what they read
    return spell_reshape(editor, origin, node) if is_call(node, aten.reshape.default) else None


def compose_expands(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``expand(expand(x, a), b) -> expand(x, b)``."""
    if not is_call(node, aten.expand.default) or not is_call(source := node.args[0], aten.expand.default):
        return None
    outer, inner = list(node.args[1]), list(source.args[1])  # type: ignore[arg-type]
    new_axes = len(outer) - len(inner)
    sizes = [inner[axis - new_axes] if axis >= new_axes and size == -1 else size for axis, size in enumerate(outer)]
    return editor.call(aten.expand.default, source.args[0], sizes)
