"""Lift attention: ``scaled_dot_product_attention`` and every spelling of ``softmax(q k^T) v`` to ``xf.attention``."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.layout import Heads, find_heads, split_heads, take_channels
from xformopt.lift.masks import MaskClass, classify_mask
from xformopt.lift.probe import Probe, constant_factor, is_movement, operator_name
from xformopt.program import Program, value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["LiftAttention"]

aten = torch.ops.aten
_PRODUCTS = ("matmul", "bmm", "baddbmm")
_LOWEST = torch.finfo(torch.float32).min


@dataclass
class _Logits:
    """What stands between ``q k^T`` and the softmax: a factor, masks and biases, outermost first."""

    q: fx.Node
    k: fx.Node
    k_transposed: bool
    scale: float = 1.0
    # (node, kind, factor, logits node it was applied to); kind: "keep", "drop" (boolean) or "add"
    terms: list[tuple[fx.Node, str, float, fx.Node]] = field(default_factory=list)


@dataclass
class _Parts:
    """Everything ``xf.attention`` needs, in concrete form."""

    q: Heads
    k: Heads
    v: Heads
    logits: _Logits
    causal: bool = False


class LiftAttention:
    """The rule; an instance remembers what it found out about each mask, which layers share."""

    __name__ = "lift-attention"

    def __init__(self, program: Program) -> None:
        self._classes: dict[tuple[str, str, str], MaskClass | str] = {}

    def __call__(self, editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        """Replace the product with the values by ``xf.attention`` followed by a split into heads."""
        name = operator_name(node)
        found: tuple[_Logits, fx.Node, bool] | Reject | None
        if name == "scaled_dot_product_attention":
            found = _sdpa_parts(node)
        elif name in _PRODUCTS and len(node.args) == 2:
            found = _product_parts(node)
        else:
            return None
        if found is None or isinstance(found, Reject):
            return found
        logits, values, causal = found
        parts = _find_parts(editor.program, node, logits, values, causal)
        return parts if isinstance(parts, Reject) else self._replace(editor, node, parts)

    def _replace(self, editor: Editor, node: fx.Node, parts: _Parts) -> fx.Node | Reject:
        merged = [take_channels(editor, heads) for heads in (parts.q, parts.k, parts.v)]
        masks = self._masks(editor, parts, merged[0])
        if isinstance(masks, Reject):
            return masks
        key_mask, bias, bounds = masks
        result = editor.call(
            xf.attention,
            *merged,
            key_mask,
            bias,
            heads=parts.q.count,
            kv_heads=parts.k.count,
            scale=parts.logits.scale * parts.q.factor * parts.k.factor,
            **bounds,
        )
        return _like(editor, split_heads(editor, result, parts.q.count), node)

    def _masks(
        self, editor: Editor, parts: _Parts, q: fx.Node
    ) -> tuple[fx.Node | None, fx.Node | None, dict[str, Any]] | Reject:
        """Return the key mask, the bias, and the band; each addend of the logits is one or the other."""
        left, right = (-1, 0) if parts.causal else (-1, -1)
        keys: list[fx.Node] = []
        biases: list[fx.Node] = []
        batch = value_of(q).shape[0]
        for term, outer, factor, logits in parts.logits.terms:
            for addend, kind in _addends(term, outer):
                meaning = self._classify(editor.program, addend, kind, logits, batch)
                if isinstance(meaning, str):
                    bias = _as_bias(editor, addend, kind, factor, logits, q, parts.q.count)
                    if isinstance(bias, Reject):
                        return bias
                    biases.append(bias)
                    continue
                left, right = _narrower(left, meaning.left), _narrower(right, meaning.right)
                if meaning.keys is not None:
                    keys.append(_key_mask(editor, meaning))
        bounds: dict[str, Any] = {
            "causal": right == 0,
            "window_left": left,
            "window_right": -1 if right == 0 else right,
        }
        return _combine(editor, aten.__and__.Tensor, keys), _combine(editor, aten.add.Tensor, biases), bounds

    def _classify(
        self, program: Program, mask: fx.Node, kind: str, logits: fx.Node, batch: int | torch.SymInt
    ) -> MaskClass | str:
        shape = tuple(value_of(logits).shape)
        known = (mask.name, kind, str(shape))
        if known not in self._classes:
            self._classes[known] = classify_mask(program, mask, shape, batch, hides=kind == "drop")
        return self._classes[known]


def _sdpa_parts(node: fx.Node) -> tuple[_Logits, fx.Node, bool] | Reject:
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    given |= node.kwargs
    q, k, v = given["query"], given["key"], given["value"]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    if given.get("dropout_p"):
        return Reject("attention drops weights at random (dropout_p > 0)")
    scale = given.get("scale")
    width = value_of(q).shape[-1]
    logits = _Logits(q, k, False, float(scale) if isinstance(scale, float | int) else 1 / math.sqrt(width))
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        kind = "keep" if value_of(mask).dtype == torch.bool else "add"
        logits.terms.append((mask, kind, 1.0, _LogitsShape(q, k)))  # type: ignore[arg-type]
    return logits, v, bool(given.get("is_causal"))


class _LogitsShape:
    """Stands for the logits of a fused attention, of which only the shape is known."""

    def __init__(self, q: fx.Node, k: fx.Node) -> None:
        shape = (*value_of(q).shape[:-1], value_of(k).shape[-2])
        with value_of(q).fake_mode:  # type: ignore[attr-defined]
            self.meta = {"val": value_of(q).new_empty(shape)}


def _product_parts(node: fx.Node) -> tuple[_Logits, fx.Node, bool] | Reject | None:
    """Recognize ``softmax(...) @ v``; None where the left side is no softmax."""
    weights, values = node.args
    assert isinstance(weights, fx.Node)
    assert isinstance(values, fx.Node)
    softmax = _past_moves(weights)
    if operator_name(softmax) not in ("softmax", "_softmax", "_safe_softmax"):
        return None
    last = value_of(softmax).dim() - 1
    if softmax.args[1] not in (-1, last):
        return Reject("the softmax is not over the keys")
    logits = softmax.args[0]
    assert isinstance(logits, fx.Node)
    found = _walk_logits(logits)
    return found if isinstance(found, Reject) else (found, values, False)


def _past_moves(node: fx.Node) -> fx.Node:
    while is_movement(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _walk_logits(node: fx.Node, factor: float = 1.0) -> _Logits | Reject:
    """Walk from the softmax up to ``q k^T``, collecting the factor, masks and biases on the way."""
    name = operator_name(node)
    if name in _PRODUCTS:
        return _first_product(node, factor)
    if is_movement(node) or name in ("_to_copy", "to"):
        assert isinstance(node.args[0], fx.Node)
        return _walk_logits(node.args[0], factor)
    if (number := constant_factor(node)) is not None:
        assert isinstance(node.args[0], fx.Node)
        return _walk_logits(node.args[0], factor * number)
    if name == "add" and not node.kwargs:
        return _walk_sum(node, factor)
    if name == "masked_fill" and _is_never(node.args[2]):
        return _walk_term(node, node.args[0], node.args[1], "drop", factor)
    if name == "where":
        condition, kept, other = node.args
        if _is_never(other):
            return _walk_term(node, kept, condition, "keep", factor)
        if _is_never(kept):
            return _walk_term(node, other, condition, "drop", factor)
    return Reject(f"the logits go through {name or 'an input'}, which attention has no place for")


def _walk_sum(node: fx.Node, factor: float) -> _Logits | Reject:
    refusals = []
    for logits, term in (node.args, node.args[::-1]):
        if not isinstance(logits, fx.Node) or not isinstance(term, fx.Node):
            continue
        found = _walk_term(node, logits, term, "add", factor)
        if not isinstance(found, Reject):
            return found
        refusals.append(found)
    return refusals[0] if refusals else Reject("the logits are added to a number")


def _walk_term(node: fx.Node, logits: Any, term: Any, kind: str, factor: float) -> _Logits | Reject:
    found = _walk_logits(logits, factor) if isinstance(logits, fx.Node) else Reject("the logits are a constant")
    if not isinstance(found, Reject):
        found.terms.append((term, kind, factor, node))
    return found


def _first_product(node: fx.Node, factor: float) -> _Logits | Reject:
    """Read ``q k^T``; ``baddbmm(m, q, k)`` adds a mask to it."""
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if operator_name(node) != "baddbmm":
        return _Logits(operands[0], operands[1], True, factor)
    if any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta")):
        return Reject("baddbmm scales its parts")
    return _Logits(operands[1], operands[2], True, factor, [(operands[0], "add", factor, node)])


def _is_never(value: object) -> bool:
    """Whether a fill value means "not attended": -inf or the dtype's lowest number, as number or 0-d constant."""
    if isinstance(value, fx.Node):
        if operator_name(value) in ("full", "scalar_tensor", "full_like"):
            position = 0 if operator_name(value) == "scalar_tensor" else 1
            return _is_never(value.args[position])
        known = value.meta.get("constant")
        return known is not None and _is_never(known)
    return isinstance(value, int | float) and value <= -1e4


def _find_parts(program: Program, node: fx.Node, logits: _Logits, values: fx.Node, causal: bool) -> _Parts | Reject:
    probe = Probe(program)
    lead: tuple[int, ...] = ()
    if logits.k_transposed:
        lead = tuple(torch.broadcast_shapes(*(probe.shape(x)[:-2] for x in (logits.q, logits.k, values))))
    heads = {
        "queries": find_heads(probe, logits.q, lead=lead, scaled=True),
        "keys": find_heads(probe, logits.k, transposed=logits.k_transposed, lead=lead, scaled=True),
        "values": find_heads(probe, values, lead=lead),
    }
    for what, found in heads.items():
        if found is None:
            return Reject(f"the {what} are not the heads of a [B, T, C] value")
    q, k, v = (found for found in heads.values() if found is not None)
    k, v = k.grouped() or k, v.grouped() or v
    if k.count != v.count or q.count % k.count:
        return Reject(f"{q.count} query heads, {k.count} key heads and {v.count} value heads do not pair up")
    if causal and not _same(program, q, k):
        return Reject("causal attention between sequences of different length")
    return _Parts(q, k, v, logits, causal)


def _same(program: Program, q: Heads, k: Heads) -> bool:
    q_axis, k_axis = (0 if heads.time_first else 1 for heads in (q, k))
    shapes = program.dims
    q_length = shapes.expression(value_of(q.source).shape[q_axis])
    return bool(q_length == shapes.expression(value_of(k.source).shape[k_axis]))


def _addends(node: fx.Node, kind: str) -> list[tuple[fx.Node, str]]:
    """Split what is added to the logits: a model may put its padding mask into its position bias first."""
    if kind != "add":
        return [(node, kind)]
    name = operator_name(node)
    if name == "add" and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args):
        return [part for argument in node.all_input_nodes for part in _addends(argument, "add")]
    if name == "where":
        condition, kept, other = node.args
        if isinstance(kept, fx.Node) and value_of(kept).dim() > 0 and _is_never(other):
            return [*_addends(kept, "add"), (condition, "keep")]  # type: ignore[list-item]
        if isinstance(other, fx.Node) and value_of(other).dim() > 0 and _is_never(kept):
            return [*_addends(other, "add"), (condition, "drop")]  # type: ignore[list-item]
    return [(node, "add")]


def _narrower(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)


def _key_mask(editor: Editor, meaning: MaskClass) -> fx.Node:
    assert meaning.keys is not None
    if value_of(meaning.keys).dtype == torch.bool:
        return meaning.keys if meaning.nonzero_keeps else editor.call(aten.logical_not.default, meaning.keys)
    return editor.call((aten.ne if meaning.nonzero_keeps else aten.eq).Scalar, meaning.keys, 0)


def _combine(editor: Editor, target: Any, nodes: list[fx.Node]) -> fx.Node | None:
    distinct = list(dict.fromkeys(nodes))
    if not distinct:
        return None
    result = distinct[0]
    for node in distinct[1:]:
        result = editor.call(target, result, node)
    return result


def _as_bias(
    editor: Editor, term: fx.Node, kind: str, factor: float, logits: fx.Node, q: fx.Node, heads: int
) -> fx.Node | Reject:
    """Return ``term`` as an additive bias that broadcasts to ``[B, H, T, S]``."""
    bias = term
    if kind != "add":
        hidden = editor.call(aten.logical_not.default, bias) if kind == "keep" else bias
        bias = editor.call(aten.mul.Tensor, editor.call(aten._to_copy.default, hidden, dtype=torch.float32), _LOWEST)
    elif factor != 1.0:
        bias = editor.call(aten.mul.Tensor, bias, factor)
    return _to_four_axes(editor, bias, value_of(logits), q, heads)


def _to_four_axes(editor: Editor, bias: fx.Node, logits: torch.Tensor, q: fx.Node, heads: int) -> fx.Node | Reject:
    while value_of(bias).dim() < logits.dim():
        bias = editor.call(aten.unsqueeze.default, bias, 0)
    if logits.dim() == 4 and _equal(editor, logits.shape[0], value_of(q).shape[0]):
        return bias
    sizes = value_of(bias).shape
    if logits.dim() == 3:
        # [B * H, T, S]
        return bias if sizes[0] == 1 else editor.call(aten.unflatten.int, bias, 0, [-1, heads])
    if logits.dim() == 5 and _equal(editor, logits.shape[2], heads):
        # [B, windows, H, T, S]
        batch = editor.call(aten.sym_size.int, q, 0)
        windows = int(logits.shape[1])
        images = editor.call(operator.floordiv, batch, windows)
        expanded = editor.call(aten.expand.default, bias, [images, windows, -1, -1, -1])
        return editor.call(aten.flatten.using_ints, expanded, 0, 1)
    return Reject(f"a bias of {tuple(sizes)} on logits of {tuple(logits.shape)} has no form [B, H, T, S]")


def _equal(editor: Editor, one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    dims = editor.program.dims
    return bool(dims.expression(one) == dims.expression(other))


def _like(editor: Editor, result: fx.Node, node: fx.Node) -> fx.Node | Reject:
    """Give ``[B, H, T, E]`` the rank of the product it replaces."""
    shape = value_of(node).shape
    if len(shape) == 3:
        return editor.call(aten.flatten.using_ints, result, 0, 1)
    if len(shape) == 5:
        if not all(isinstance(size, int) for size in shape[1:3]):
            return Reject("the axes of groups and heads vary")
        if shape[1] * shape[2] != value_of(result).shape[1]:
            return Reject(f"the result {tuple(shape)} has no [B, H, T, E] form")
        return editor.call(aten.unflatten.int, result, 1, [shape[1], shape[2]])
    return result
