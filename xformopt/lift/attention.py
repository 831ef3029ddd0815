"""Lift attention: ``scaled_dot_product_attention`` and every spelling of ``softmax(q k^T) v`` to ``xf.attention``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.layout import Heads, find_heads, split_heads, take_channels
from xformopt.lift.logits import Logits, Term, fused_attention, written_attention
from xformopt.lift.masks import MaskClass, classify_mask
from xformopt.lift.probe import Probe, operator_name
from xformopt.program import Program, Shape, Size, shape_of, value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["LiftAttention", "move_gate"]

aten = torch.ops.aten
_LOWEST = torch.finfo(torch.float32).min


def move_gate(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``(g softmax(...)) @ v`` with one g for all queries and keys becomes ``g (softmax(...) @ v)``."""
    if operator_name(node) not in ("matmul", "bmm") or operator_name(node.args[0]) != "mul":
        return None
    weights, values = node.args
    assert isinstance(weights, fx.Node)
    for gate, softmax in (weights.args[:2], weights.args[1::-1]):
        if not isinstance(gate, fx.Node) or operator_name(softmax) not in ("softmax", "_softmax", "_safe_softmax"):
            continue
        if value_of(gate).dim() == value_of(weights).dim() and value_of(gate).shape[-2:] == (1, 1):
            return editor.call(aten.mul.Tensor, editor.call(aten.matmul.default, softmax, values), gate)
    return None


@dataclass
class _Parts:
    """Everything ``xf.attention`` needs, in concrete form."""

    q: Heads
    k: Heads
    v: Heads
    logits: Logits
    causal: bool = False


class LiftAttention:
    """The rule; an instance remembers what it found out about each mask, which layers share."""

    __name__ = "lift-attention"

    def __init__(self, program: Program) -> None:
        self._classes: dict[tuple[fx.Node, str, str], MaskClass | str] = {}

    def __call__(self, editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
        """Replace the product with the values by ``xf.attention`` followed by a split into heads."""
        name = operator_name(node)
        found: tuple[Logits, fx.Node, bool] | Reject | None
        if name == "scaled_dot_product_attention":
            found = fused_attention(editor, node)
        elif name in ("matmul", "bmm"):
            found = written_attention(editor, node)
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
        whole = _like(editor, split_heads(editor, result, parts.q.count), node)
        if not isinstance(whole, Reject) and shape_of(editor.program, whole) != shape_of(editor.program, node):
            return Reject(f"the result {shape_of(editor.program, node)} has no [B, H, T, E] form")
        return whole

    def _masks(
        self, editor: Editor, parts: _Parts, q: fx.Node
    ) -> tuple[fx.Node | None, fx.Node | None, dict[str, Any]] | Reject:
        """Return the key mask, the bias, and the band; each addend of the logits is one or the other."""
        left, right = (-1, 0) if parts.causal else (-1, -1)
        keys: list[fx.Node] = []
        biases: list[fx.Node] = []
        batch = value_of(q).shape[0]
        for term in parts.logits.terms:
            meaning = self._classify(editor.program, term, batch)
            if isinstance(meaning, str):
                bias = _as_bias(editor, term, q, parts.q.count)
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

    def _classify(self, program: Program, term: Term, batch: int | torch.SymInt) -> MaskClass | str:
        shape = tuple(term.logits.shape)
        known = (term.node, term.kind, str(shape))
        if known not in self._classes:
            self._classes[known] = classify_mask(program, term.node, shape, batch, hides=term.kind == "drop")
        return self._classes[known]


def _find_parts(program: Program, node: fx.Node, logits: Logits, values: fx.Node, causal: bool) -> _Parts | Reject:
    probe = Probe(program)
    lead = _broadcast(program, (logits.q, logits.k, values)) if logits.k_transposed else ()
    heads = {
        "queries": find_heads(probe, logits.q, lead=lead, scaled=True),
        "keys": find_heads(probe, logits.k, transposed=logits.k_transposed, lead=lead, scaled=True),
        "values": find_heads(probe, values, lead=lead),
    }
    for what, found in heads.items():
        if found is None:
            return Reject(f"the {what} are not the heads of a [B, T, C] value")
    q, k, v = (found for found in heads.values() if found is not None)
    grouped_k, grouped_v = k.grouped() or k, v.grouped() or v
    if grouped_k.count == grouped_v.count:
        k, v = grouped_k, grouped_v
    if k.count != v.count or q.count % k.count:
        return Reject(f"{q.count} query heads, {k.count} key heads and {v.count} value heads do not pair up")
    if causal and not _same(program, q, k):
        return Reject("causal attention between sequences of different length")
    return _Parts(q, k, v, logits, causal)


def _broadcast(program: Program, nodes: Sequence[fx.Node]) -> Shape:
    """Return the leading shape of a product of ``nodes``, as dimensions."""
    shapes = [shape_of(program, node)[-3::-1] for node in nodes]
    found: list[Size] = []
    for sizes in zip_longest(*shapes, fillvalue=1):
        found.append(next((size for size in sizes if size != 1), 1))
    return tuple(reversed(found))


def _same(program: Program, q: Heads, k: Heads) -> bool:
    q_axis, k_axis = (0 if heads.time_first else 1 for heads in (q, k))
    shapes = program.dims
    q_length = shapes.expression(value_of(q.source).shape[q_axis])
    return bool(q_length == shapes.expression(value_of(k.source).shape[k_axis]))


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


def _as_bias(editor: Editor, term: Term, q: fx.Node, heads: int) -> fx.Node | Reject:
    """Return ``term`` as an additive bias that broadcasts to ``[B, H, T, S]``."""
    bias = term.node
    if term.kind != "add":
        hidden = editor.call(aten.logical_not.default, bias) if term.kind == "keep" else bias
        bias = editor.call(aten.mul.Tensor, editor.call(aten._to_copy.default, hidden, dtype=torch.float32), _LOWEST)
    elif term.factor != 1.0:
        bias = editor.call(aten.mul.Tensor, bias, term.factor)
    return _to_four_axes(editor, bias, term.logits, q, heads)


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
