"""Fold adapters beside an FFN into it, as extra units (AdaptFormer).

    W2 f(W1 n + b1) + b2 + s (U relu(D n + d) + u)    ->    [W2  sU] [f(h1); relu(h2)] + (b2 + s u),
                                                            [h1; h2] = [W1; D] n + [b1; d]

Both have to read the same value, or norms of the same value that differ in weight and bias alone, which then move into
the first layers.  A branch that reads the stream in front of the norm is no part of the FFN.  Where the two functions
differ, the hidden values are cut, each part gets its own, and they are joined: that copies them, so measure whether
two products fewer are worth it; where they are the same, nothing is copied.

**Exact** up to the rounding of the new parameters, which are computed in float64.  Run it before
``fuse-bias-activation`` and ``fuse-add-norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.adapt.support.branches import added, compose, plus, summands, walk
from xformopt.passes.weights import LinearParts, is_linear, linear_parts, replace_linear, shared_parameter
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program, value_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["FoldParallelAdapters"]

aten = torch.ops.aten
_NORMS = (xf.layer_norm, xf.rms_norm)


@dataclass(frozen=True)
class FoldParallelAdapters(RewritePass):
    """Make adapters that stand beside an FFN units of it."""

    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Chen et al., AdaptFormer, arXiv 2205.13535, section 3.2",)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the addition."""
        return (_fold_parallel_adapter,)


@dataclass(frozen=True)
class _Mlp:
    """Two linear layers with a function between them, one term of a sum; the second with what scales it, float64."""

    end: fx.Node
    first: LinearParts
    function: str
    second: LinearParts
    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def source(self) -> fx.Node:
        return operand(self.first.node)


def _fold_parallel_adapter(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not is_call(node, aten.add.Tensor):
        return None
    terms = summands(node)
    found = [mlp for term in terms if (mlp := _mlp(editor, term)) is not None]
    if len(found) < 2:
        return None
    if refused := [mlp for mlp in found if isinstance(mlp, Reject)]:
        return refused[0]
    mlps = [mlp for mlp in found if isinstance(mlp, _Mlp)]
    main = max(mlps, key=lambda mlp: len(mlp.first.weight))
    reason = None
    for adapter in mlps:
        if adapter is not main:
            source = _common_source(editor, main, adapter)
            if isinstance(source, Reject):
                reason = reason or source
                continue
            joined = _join(editor, main, adapter, source)
            return added(editor, [joined if term is main.end else term for term in terms if term is not adapter.end])
    return reason


def _mlp(editor: Editor, term: fx.Node) -> _Mlp | Reject | None:
    path = list(walk(term))
    chain, hidden = path[:-1], path[-1]
    if not is_call(hidden, xf.activation) or not is_linear(operand(hidden)) or not chain or not is_linear(chain[-1]):
        return None
    if any(len(node.users) > 1 for node in (*chain, hidden, operand(hidden))):
        return Reject("something else reads the values of one of the two branches, too")
    first, second = linear_parts(editor, operand(hidden)), linear_parts(editor, chain[-1])
    for parts in (first, second):
        if isinstance(parts, Reject):
            return parts
        if (refusal := shared_parameter(parts)) is not None:
            return refusal
    function = compose(editor, chain)
    if isinstance(function, Reject):
        return function
    assert isinstance(first, LinearParts)
    assert isinstance(second, LinearParts)
    return _Mlp(term, first, str(arguments(hidden)["function"]), second, function[0], function[1])


def _common_source(editor: Editor, main: _Mlp, adapter: _Mlp) -> fx.Node | Reject | None:
    """Return what both read; None where it is a norm without weight and bias that does not exist yet."""
    one, other = main.source, adapter.source
    if one is other:
        return one
    if not (is_call(one, *_NORMS) and is_call(other, *_NORMS)):
        if is_call(one, *_NORMS) and operand(one) is other:
            return Reject("the adapter reads the stream in front of the norm, the FFN behind it: they share no input")
        return Reject("the two branches read different values")
    mine, its = (dict(arguments(norm)) for norm in (one, other))
    affine = [given.pop(name, None) for given in (mine, its) for name in ("weight", "bias")]
    if one.target is not other.target or mine != its or mine["groups"] != 1:
        return Reject("the two branches read different norms")
    if any(value is not None and editor.constant(value) is None for value in affine):
        return Reject("the weight or bias of a norm is computed")
    return None


def _join(editor: Editor, main: _Mlp, adapter: _Mlp, source: fx.Node | None) -> fx.Node:
    """Return the output of one FFN with the units of both."""
    firsts = [_first_layer(editor, mlp, is_plain=source is None) for mlp in (main, adapter)]
    if source is None:
        given = arguments(main.source)
        source = editor.call(main.source.target, given["x"], eps=given["eps"])
    weight = torch.cat([weight for weight, _ in firsts])
    bias = None
    if any(bias is not None for _, bias in firsts):
        bias = torch.cat([torch.zeros(len(w), dtype=w.dtype) if b is None else b for w, b in firsts])
    hidden = replace_linear(editor, main.first, source, weight, bias)
    active = _activated(editor, hidden, main, adapter)
    return replace_linear(
        editor, main.second, active, torch.cat([main.weight, adapter.weight], 1), plus(main.bias, adapter.bias)
    )


def _first_layer(editor: Editor, mlp: _Mlp, *, is_plain: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the first layer's parameters, with those of the norm in front of it where that becomes a plain one."""
    weight = mlp.first.weight.double()
    bias = None if mlp.first.bias is None else mlp.first.bias.double()
    if is_plain:
        given = arguments(mlp.source)
        scale, shift = editor.constant(given["weight"]), editor.constant(given.get("bias"))
        bias = plus(bias, None if shift is None else weight @ shift.double())
        weight = weight if scale is None else weight * scale.double()
    return weight, bias


def _activated(editor: Editor, hidden: fx.Node, main: _Mlp, adapter: _Mlp) -> fx.Node:
    if main.function == adapter.function:
        return editor.call(xf.activation, hidden, function=main.function)
    last, cut = value_of(hidden).dim() - 1, len(main.first.weight)
    parts = []
    for start, end, function in ((0, cut, main.function), (cut, cut + len(adapter.first.weight), adapter.function)):
        part = editor.call(aten.slice.Tensor, hidden, last, start, end)
        parts.append(editor.call(xf.activation, part, function=function))
    return editor.call(aten.cat.default, parts, last)
