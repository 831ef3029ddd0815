"""Read attention backwards: from the product with the values over the softmax up to queries, keys, masks and biases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xformopt.lift.probe import Probe, constant_factor, is_movement, operator_name
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["Logits", "Term", "fused_attention", "written_attention"]

# what hides a key is far below every logit, and stays so when the logits are scaled afterwards
_NEVER = -1e4


@dataclass(frozen=True)
class Term:
    """What is done to the logits at one place: ``kind`` is "keep" or "drop" (boolean), or "add".

    ``factor`` multiplies the logits afterwards; ``logits`` has the shape they have there.
    """

    node: fx.Node
    kind: str
    factor: float
    logits: torch.Tensor


@dataclass
class Logits:
    """What stands between ``q k^T`` and the softmax: a factor, masks and biases, outermost first."""

    q: fx.Node
    k: fx.Node
    k_transposed: bool
    scale: float = 1.0
    terms: list[Term] = field(default_factory=list)


def fused_attention(editor: Editor, node: fx.Node) -> tuple[Logits, fx.Node, bool] | Reject:
    """Read ``scaled_dot_product_attention`` as (logits, values, whether it is causal)."""
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
    logits = Logits(q, k, False, float(scale) if isinstance(scale, float | int) else 1 / math.sqrt(width))
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        kind = "keep" if value_of(mask).dtype == torch.bool else "add"
        logits.terms.extend(_addends(mask, kind, 1.0, _scores(q, k), _Walk(editor).never))
    return logits, v, bool(given.get("is_causal"))


def _scores(q: fx.Node, k: fx.Node) -> torch.Tensor:
    shape = (*value_of(q).shape[:-1], value_of(k).shape[-2])
    with value_of(q).fake_mode:  # type: ignore[attr-defined]
        return value_of(q).new_empty(shape)


def written_attention(editor: Editor, node: fx.Node) -> tuple[Logits, fx.Node, bool] | Reject | None:
    """Read ``softmax(...) @ v`` as (logits, values, False); None where the left side is no softmax."""
    weights, values = node.args
    assert isinstance(weights, fx.Node)
    assert isinstance(values, fx.Node)
    softmax = weights
    while is_movement(softmax) and isinstance(softmax.args[0], fx.Node):
        softmax = softmax.args[0]
    if operator_name(softmax) not in ("softmax", "_softmax", "_safe_softmax"):
        return None
    if softmax.args[1] not in (-1, value_of(softmax).dim() - 1):
        return Reject("the softmax is not over the keys")
    if not _keeps_order(editor, weights, softmax):
        return Reject("the weights are rearranged between the softmax and the values")
    logits = softmax.args[0]
    assert isinstance(logits, fx.Node)
    found = _Walk(editor).logits(logits, 1.0)
    return found if isinstance(found, Reject) else (found, values, False)


def _keeps_order(editor: Editor, node: fx.Node, source: fx.Node) -> bool:
    """Whether the movements from ``source`` to ``node`` only regroup the leading axes."""
    if node is source:
        return True
    moved = Probe(editor.program).moved(node, source)
    return moved is not None and torch.equal(moved.reshape(-1), torch.arange(moved.numel()))


class _Walk:
    """The way from the softmax up to ``q k^T``, collecting the factor, masks and biases."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def logits(self, node: fx.Node, factor: float) -> Logits | Reject:
        """Read the logits that ``node`` is, to be multiplied by ``factor``."""
        name = operator_name(node)
        if name in ("matmul", "bmm"):
            q, k = node.all_input_nodes * (2 if node.args[0] is node.args[1] else 1)
            return Logits(q, k, True, factor)
        if (number := constant_factor(node)) is not None:
            return self.logits(node.all_input_nodes[0], factor * number)
        if is_movement(node):
            source = node.all_input_nodes[0]
            if not _keeps_order(self.editor, node, source):
                return Reject(f"{name} rearranges the logits")
            return self.logits(source, factor)
        if name in ("_to_copy", "to") and value_of(node).is_floating_point():
            return self.logits(node.all_input_nodes[0], factor)
        if name == "add" and not node.kwargs:
            return self._sum(node, factor)
        if name == "masked_fill" and self.never(node.args[2]):
            return self._term(node, node.args[0], node.args[1], "drop", factor)
        if name == "where":
            condition, kept, other = node.args
            if self.never(other):
                return self._term(node, kept, condition, "keep", factor)
            if self.never(kept):
                return self._term(node, other, condition, "drop", factor)
        return Reject(f"the logits go through {name or 'an input'}, which attention has no place for")

    def _sum(self, node: fx.Node, factor: float) -> Logits | Reject:
        refusals = []
        for logits, term in (node.args, node.args[::-1]):
            if not isinstance(logits, fx.Node) or not isinstance(term, fx.Node):
                continue
            found = self._term(node, logits, term, "add", factor)
            if not isinstance(found, Reject):
                return found
            refusals.append(found)
        return refusals[0] if refusals else Reject("a number is added to the logits")

    def _term(self, node: fx.Node, logits: Any, term: Any, kind: str, factor: float) -> Logits | Reject:
        if not isinstance(logits, fx.Node) or not isinstance(term, fx.Node):
            return Reject("the logits are a constant")
        found = self.logits(logits, factor)
        if isinstance(found, Reject):
            return found
        if factor <= 0:
            return Reject(f"masked logits are multiplied by {factor}")
        found.terms.extend(_addends(term, kind, factor, value_of(node), self.never))
        return found

    def never(self, value: object) -> bool:
        """As :func:`_never`, knowing the parameters."""
        constant = self.editor.constant(value)
        if constant is not None and constant.numel() == 1:
            return _never(constant.item())
        return _never(value)


def _never(value: object) -> bool:
    """Whether a fill value means "not attended": -inf or a number so low, as such or as a constant tensor."""
    if isinstance(value, fx.Node):
        position = {"full": 1, "full_like": 1, "scalar_tensor": 0}.get(operator_name(value))
        return position is not None and _never(value.args[position])
    return isinstance(value, int | float) and value <= _NEVER


def _addends(
    node: fx.Node, kind: str, factor: float, logits: torch.Tensor, never: Callable[[object], bool]
) -> list[Term]:
    """Split what is added to the logits: a model may put its padding mask into its position bias first."""
    name = operator_name(node)
    if kind != "add":
        return [Term(node, kind, factor, logits)]
    if name == "add" and not node.kwargs and all(isinstance(argument, fx.Node) for argument in node.args):
        parts = [_addends(part, "add", factor, logits, never) for part in node.args]  # type: ignore[arg-type]
        return [term for part in parts for term in part]
    if name == "where":
        condition, kept, other = node.args
        assert isinstance(condition, fx.Node)
        for bias, fill, way in ((kept, other, "keep"), (other, kept, "drop")):
            if isinstance(bias, fx.Node) and value_of(bias).dim() > 0 and never(fill):
                return [*_addends(bias, "add", factor, logits, never), Term(condition, way, factor, logits)]
    return [Term(node, "add", factor, logits)]
