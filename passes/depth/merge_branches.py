"""Make one branch of several that are added up.

Branches whose nonlinearities see the same value (structural reparameterization, Zhou et al.) become one by addition:

    sum_i W2_i f(sum_k W1_k x)    ->    (sum_i W2_i) f((sum_k W1_k) x)

Branches with nonlinearities of their own (ParallelViT, Touvron et al.) become one by concatenation, an FFN of twice the
hidden width or an attention of twice the heads:

    W2_1 f(W1_1 x) + W2_2 f(W1_2 x)    ->    [W2_1, W2_2] f([W1_1; W1_2] x)

Norms in front of them share mean and variance, so that their weights and biases are folded into the first layers, and
one plain norm remains.

**Exact** up to the rounding of the new parameters, which are computed in float64.  Addition saves operations and bytes;
concatenation saves neither, and wins by having fewer and wider operators.  Run it after
``eliminate-common-subexpressions`` and before the passes that fuse.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from xformopt.match import arguments, call_with, is_call, operand, xf
from xformopt.passes.depth.support.branches import Branch, Entry, read_branch, read_linear, summands
from xformopt.passes.weights import LinearParts, is_linear, replace_linear
from xformopt.pipeline import Context, PassResult, RewritePass
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor, Reject, Rule

__all__ = ["MergeBranches"]

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class MergeBranches(RewritePass):
    """Make one branch of several that are added up, by adding or by concatenating their matrices."""

    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Zhou et al., Rethinking Vision Transformer Depth via Structural Reparameterization, arXiv 2511.19718",
        "Touvron et al., Three things everyone should know about Vision Transformers, arXiv 2203.09795",
    )

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Return the one rule; it fires at the sum, for one group of branches at a time."""
        return (_merge_branches,)

    def run(self, program: Program, context: Context) -> PassResult:
        """Merge what can be, and say so where there was nothing to look at."""
        result = super().run(program, context)
        if result.changed or result.rejected:
            return result
        sums = [node for node in program.nodes() if _is_whole_sum(node)]
        note = (
            f"looked for sums of several linear layers, or of several branches W2 f(W1 x): of {len(sums)} sums of "
            f"equal shapes, none adds up two of them"
        )
        return replace(result, notes=(note,))


def _is_whole_sum(node: fx.Node) -> bool:
    """Whether ``node`` is a sum, and not a term of another one that takes it in."""
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], torch.ops.aten.stack.default):
        users = list(users[0].users)
    return bool(summands(node)) and not (len(users) == 1 and summands(users[0]))


def _merge_branches(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    if not _is_whole_sum(node):
        return None
    terms = summands(node)
    linears = [read_linear(editor, term) for term in terms if is_linear(term)]
    layers = [layer for layer in linears if isinstance(layer, LinearParts)]
    if len(linears) < 2:
        return None
    if same := _largest(layers, lambda layer: operand(layer.node)):
        return _rest(editor, terms, [layer.node for layer in same], _added(editor, same))
    found = [read_branch(editor, layer) for layer in layers]
    branches = [branch for branch in found if isinstance(branch, Branch)]
    if alike := _largest(branches, lambda branch: tuple(branch.form.items())):
        return _rest(editor, terms, [branch.last.node for branch in alike], _concatenated(editor, alike))
    if refused := [part for part in (*linears, *found) if isinstance(part, Reject)]:
        return refused[0]
    if len(branches) < 2:
        return Reject("the terms of this sum read different values, and no two of them are branches W2 f(W1 x)")
    one, other = (branch.form for branch in branches[:2])
    differing = next(what for what in one if one[what] != other.get(what))
    return Reject(f"the branches differ in {differing}")


def _largest(parts: Iterable[_Part], key: Callable[[_Part], Hashable]) -> list[_Part]:
    """Return the first of the largest groups that agree in ``key``, or nothing where none has two members."""
    groups: dict[Hashable, list[_Part]] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    best = max(groups.values(), key=len, default=[])
    return best if len(best) > 1 else []


def _rest(editor: Editor, terms: Sequence[fx.Node], merged: Sequence[fx.Node], one: fx.Node) -> fx.Node:
    """Return the sum of what was not merged, in its order, and of what was."""
    total, *others = [*(term for term in terms if term not in merged), one]
    for term in others:
        total = editor.call(torch.ops.aten.add.Tensor, total, term)
    return total


def _added(editor: Editor, layers: Sequence[LinearParts]) -> fx.Node:
    weight = torch.stack([layer.weight.double() for layer in layers]).sum(0)
    return replace_linear(editor, layers[0], operand(layers[0].node), weight, _bias_sum(layers))


def _bias_sum(layers: Sequence[LinearParts]) -> torch.Tensor | None:
    biases = [layer.bias.double() for layer in layers if layer.bias is not None]
    return torch.stack(biases).sum(0) if biases else None


def _concatenated(editor: Editor, branches: Sequence[Branch]) -> fx.Node:
    first = branches[0]
    sources: dict[Hashable, fx.Node] = {}
    inputs = {
        role: _wide_entry(editor, [branch.entries[role] for branch in branches], sources) for role in first.entries
    }
    middle = call_with(editor, first.middle, **inputs, **_heads([branch.middle for branch in branches]))
    middle.meta["path"] = path_of(first.middle)
    weight = torch.cat([branch.last.weight.double() for branch in branches], 1)
    return replace_linear(editor, first.last, middle, weight, _bias_sum([branch.last for branch in branches]))


def _heads(middles: Sequence[fx.Node]) -> dict[str, Any]:
    names = ("heads", "kv_heads") if is_call(middles[0], xf.attention) else ()
    return {name: sum(arguments(middle)[name] for middle in middles) for name in names}


def _wide_entry(editor: Editor, entries: Sequence[Entry], sources: dict[Hashable, fx.Node]) -> fx.Node:
    """Return one layer for all ``entries``, rotated as they are; ``sources`` are the plain norms made so far."""
    first = entries[0]
    norms = {entry.norm for entry in entries}
    source = operand(first.linear.node)
    if len(norms) > 1 or None in norms:
        weights, biases = zip(*(_folded(editor, entry) for entry in entries), strict=True)
        if first.norm is not None:
            source = sources.setdefault(first.reads, sources.get(first.reads) or _plain(editor, first.norm))
    else:
        weights, biases = zip(*((e.linear.weight.double(), e.linear.bias) for e in entries), strict=True)
    bias = None
    if any(value is not None for value in biases):
        filled = [w.new_zeros(len(w)) if b is None else b.double() for w, b in zip(weights, biases, strict=True)]
        bias = torch.cat(filled)
    wide = replace_linear(editor, first.linear, source, torch.cat(weights), bias)
    if first.rope is None:
        return wide
    heads = sum(arguments(entry.rope)["heads"] for entry in entries if entry.rope is not None)
    turned = call_with(editor, first.rope, x=wide, heads=heads)
    turned.meta["path"] = path_of(first.rope)
    return turned


def _plain(editor: Editor, norm: fx.Node) -> fx.Node:
    plain = editor.call(norm.target, operand(norm), eps=arguments(norm)["eps"])
    plain.meta["path"] = path_of(norm)
    return plain


def _folded(editor: Editor, entry: Entry) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer's weight and bias in float64, with its norm's weight and bias in them."""
    weight = entry.linear.weight.double()
    bias = None if entry.linear.bias is None else entry.linear.bias.double()
    if entry.norm is None:
        return weight, bias
    given = arguments(entry.norm)
    scale, shift = editor.constant(given["weight"]), editor.constant(given.get("bias"))
    if shift is not None:
        moved = weight @ shift.double()
        bias = moved if bias is None else bias + moved
    return (weight if scale is None else weight * scale.double()), bias
