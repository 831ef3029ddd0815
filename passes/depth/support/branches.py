"""Branches that are added up: what each is made of, and whether two of them can be one.

A branch is ``W2 f(W1 n(x))``: a norm or none, first layers, a nonlinearity, and a last layer whose result is added.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.weights import LinearParts, is_linear, linear_parts, shared_parameter
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["Branch", "Entry", "read_branch", "read_linear", "summands"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Entry:
    """A first layer of a branch.

    Attributes:
        linear: The layer.
        rope: The rotary embedding between it and the nonlinearity, if any.
        norm: The norm it reads whose affine part can be folded into it, if any.

    """

    linear: LinearParts
    rope: fx.Node | None
    norm: fx.Node | None

    @property
    def reads(self) -> Hashable:
        """What it computes from: its operand, or a norm without its affine part."""
        if self.norm is None:
            return operand(self.linear.node)
        return (self.norm.target, operand(self.norm), arguments(self.norm)["eps"])

    @property
    def turns(self) -> Hashable:
        """The rotation of each head."""
        if self.rope is None:
            return None
        given = arguments(self.rope)
        return (given["cos"], given["sin"], given["interleaved"])


@dataclass(frozen=True)
class Branch:
    """A branch with a nonlinearity.

    Attributes:
        last: Its last layer.
        middle: Its nonlinearity: an activation, a gated unit or an attention.
        entries: Its first layers by what they are to the nonlinearity.

    """

    last: LinearParts
    middle: fx.Node
    entries: Mapping[str, Entry]

    @property
    def form(self) -> Mapping[str, Hashable]:
        """What has to be equal in two branches that become one, each under what a report calls it."""
        found: dict[str, Hashable] = {"the nonlinearity": (self.middle.target, arguments(self.middle).get("function"))}
        found["what they read"] = tuple(entry.reads for entry in self.entries.values())
        if is_call(self.middle, xf.attention):
            found |= _attention_form(self.middle)
            found["the rotary embedding"] = tuple(entry.turns for entry in self.entries.values())
        return found


def summands(node: fx.Node) -> list[fx.Node]:
    """Return the terms of a sum in all its depth, or nothing where ``node`` is no sum of equal shapes."""
    terms = _terms(node)
    return [part for term in terms for part in (summands(term) if len(term.users) == 1 else []) or [term]]


def read_linear(editor: Editor, node: fx.Node) -> LinearParts | Reject:
    """Read a linear layer that may become part of another one; a reason if it has to stay."""
    parts = linear_parts(editor, node)
    if isinstance(parts, Reject):
        return parts
    if len(node.users) > 1:
        return Reject(f"%{node.name} is read elsewhere, too")
    return shared_parameter(parts) or parts


def read_branch(editor: Editor, last: LinearParts) -> Branch | Reject | None:
    """Read the branch that ends in ``last``; None where there is no nonlinearity in front of it, or no first layers."""
    middle = operand(last.node)
    roles = _roles(middle)
    sources = {role: arguments(middle)[role] for role in roles}
    if not roles or not all(is_linear(_unturned(source)) for source in sources.values()):
        return None
    if len(middle.users) > 1:
        return Reject(f"%{middle.name} is read elsewhere, too")
    if len(set(sources.values())) < len(sources):
        return Reject(f"one layer has several roles in %{middle.name}")
    entries: dict[str, Entry] = {}
    for role, source in sources.items():
        parts = read_linear(editor, _unturned(source))
        if isinstance(parts, Reject):
            return parts
        entries[role] = Entry(parts, source if source is not parts.node else None, _foldable_norm(editor, parts))
    return Branch(last, middle, entries)


def _terms(node: fx.Node) -> list[fx.Node]:
    if is_call(node, aten.add.Tensor) and arguments(node)["alpha"] == 1:
        found = list(node.args[:2])
    elif is_call(node, aten.sum.dim_IntList) and is_call(operand(node), aten.stack.default):
        stack, given = arguments(operand(node)), arguments(node)
        axes = [axis % value_of(operand(node)).dim() for axis in given["dim"]]
        if axes != [stack["dim"] % value_of(operand(node)).dim()] or given["keepdim"] or given["dtype"] is not None:
            return []
        found = list(stack["tensors"])
    else:
        return []
    terms = [term for term in found if isinstance(term, fx.Node)]
    sizes, dtype = value_of(node).shape, value_of(node).dtype
    alike = all(value_of(term).shape == sizes and value_of(term).dtype == dtype for term in terms)
    return terms if alike and len(terms) == len(found) and len(set(terms)) == len(terms) else []


def _roles(middle: fx.Node) -> tuple[str, ...]:
    if is_call(middle, xf.attention):
        return ("q", "k", "v")
    if is_call(middle, xf.glu):
        return ("gate", "up")
    return ("x",) if is_call(middle, xf.activation) else ()


def _unturned(source: fx.Node) -> fx.Node:
    return operand(source) if is_call(source, xf.rope) and len(source.users) == 1 else source


def _foldable_norm(editor: Editor, parts: LinearParts) -> fx.Node | None:
    norm = operand(parts.node)
    if not is_call(norm, xf.layer_norm, xf.rms_norm) or arguments(norm)["groups"] != 1:
        return None
    affine = [arguments(norm)["weight"], arguments(norm).get("bias")]
    return norm if all(value is None or editor.constant(value) is not None for value in affine) else None


def _attention_form(middle: fx.Node) -> dict[str, Hashable]:
    given = arguments(middle)
    widths = {role: int(value_of(given[role]).shape[2]) for role in ("q", "v")}
    found: dict[str, Hashable] = {
        "the width of heads": (widths["q"] / given["heads"], widths["v"] / given["kv_heads"]),
        "the query heads of a key head": given["heads"] / given["kv_heads"],
        "the scale": given["scale"],
    }
    found["the keys they may see"] = tuple(
        given[name] for name in ("key_mask", "key_log_size", "causal", "window_left", "window_right")
    )
    bias = given["bias"]
    # a bias that differs from head to head would have to be joined as well
    found["the bias of logits"] = bias if bias is None or _is_for_all_heads(bias) else middle
    return found


def _is_for_all_heads(bias: fx.Node) -> bool:
    shape = value_of(bias).shape
    return len(shape) < 3 or shape[-3] == 1
