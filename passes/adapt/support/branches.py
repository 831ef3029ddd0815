"""Branches beside a linear layer that are linear themselves: found by what they read, and folded into its weight.

    sum = (W x + b) + g(x),       g(x) = G x + c        ->    (W + G) x + (b + c)
    sum = h + g(h),  h = W x + b                        ->    (W + G W) x + (b + G b + c)

g is made of linear layers and of products with constants.  All is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.passes.weights import LinearParts, is_linear, linear_parts, replace_linear, shared_parameter
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["Branch", "added", "compose", "find_branch", "fold_branch", "plus", "summands", "walk"]

aten = torch.ops.aten
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class Branch:
    """A linear branch beside a linear layer.

    Attributes:
        base: The layer.
        end: What the branch adds.
        reads_output: Whether the branch reads what the layer returns, instead of what it reads.
        weight: G, float64 ``[O, I]``, or ``[O, O]`` where the branch reads the layer's output.
        bias: c, float64 ``[O]``, or None.
        narrowest: The smallest width on the way: the rank of G, at most.

    """

    base: LinearParts
    end: fx.Node
    reads_output: bool
    weight: torch.Tensor
    bias: torch.Tensor | None
    narrowest: int


def summands(node: fx.Node) -> list[fx.Node]:
    """Return the values of one shape that a tree of additions sums up, in order."""
    if not is_call(node, aten.add.Tensor) or arguments(node)["alpha"] != 1:
        return [node]
    terms = [node.args[0], node.args[1]]
    shape = value_of(node).shape
    if not all(isinstance(term, fx.Node) and value_of(term).shape == shape for term in terms):
        return [node]
    found: list[fx.Node] = []
    for term in terms:
        assert isinstance(term, fx.Node)
        found += summands(term) if len(term.users) == 1 else [term]
    return found


def find_branch(editor: Editor, root: fx.Node) -> Branch | Reject | None:
    """Return a linear branch beside a linear layer in the sum ``root``; None where nothing in it looks like one."""
    terms = summands(root)
    refusal: Reject | None = None
    for base in terms:
        for end in terms:
            if end is base or not is_linear(base):
                continue
            found = _branch(editor, base, end)
            if isinstance(found, Branch):
                return found
            refusal = refusal or found
    return refusal


def fold_branch(editor: Editor, root: fx.Node, branch: Branch) -> fx.Node:
    """Return the sum ``root`` with the branch in the weight of its layer."""
    base = branch.base
    weight = base.weight.double()
    bias = None if base.bias is None else base.bias.double()
    if branch.reads_output:
        moved = None if bias is None else branch.weight @ bias
        weight = weight + branch.weight @ weight
        bias = plus(plus(bias, moved), branch.bias)
    else:
        weight, bias = weight + branch.weight, plus(bias, branch.bias)
    folded = replace_linear(editor, base, operand(base.node), weight, bias)
    return added(editor, [folded if term is base.node else term for term in summands(root) if term is not branch.end])


def added(editor: Editor, terms: Sequence[fx.Node]) -> fx.Node:
    """Return the sum of ``terms``."""
    total = terms[0]
    for term in terms[1:]:
        total = editor.call(aten.add.Tensor, total, term)
    return total


def plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sum of two biases, where None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _branch(editor: Editor, base: fx.Node, end: fx.Node) -> Branch | Reject | None:
    path = list(walk(end))
    read = operand(base)
    stop = base if base in path else read if read in path else None
    if stop is end:
        return None
    if stop is None:
        return _nonlinear(path[-1], read)
    chain = path[: path.index(stop)]
    if not any(map(is_linear, chain)):
        return None
    parts = linear_parts(editor, base)
    if isinstance(parts, Reject):
        return parts
    outside = set(base.users) - {chain[-1]} if stop is base else set(base.users)
    if len(outside) > 1 or any(len(node.users) > 1 for node in chain):
        return Reject("something else reads the layer or the branch beside it, too")
    if (refusal := shared_parameter(parts)) is not None:
        return refusal
    function = compose(editor, chain)
    return function if isinstance(function, Reject) else Branch(parts, end, stop is base, *function)


def compose(editor: Editor, chain: Sequence[fx.Node]) -> tuple[torch.Tensor, torch.Tensor | None, int] | Reject:
    """Return weight ``[O, I]`` and bias ``[O]`` (float64) of a chain of linear steps, the last one first, and its rank.

    The rank is the smallest width on the way; the weight's own may be smaller.
    """
    inputs = _varying(chain[-1]) if is_call(chain[-1], *_PRODUCTS) else operand(chain[-1])
    assert inputs is not None
    weight = torch.eye(int(value_of(inputs).shape[-1]), dtype=torch.float64)
    bias: torch.Tensor | None = None
    narrowest = len(weight)
    for node in reversed(chain):
        applied = _apply(editor, node, weight, bias)
        if isinstance(applied, Reject):
            return applied
        weight, bias = applied
        narrowest = min(narrowest, len(weight))
    return weight, bias, narrowest


def walk(node: fx.Node) -> Iterator[fx.Node]:
    """Yield ``node`` and what it is a linear function of, down to what is no linear function of one value."""
    while True:
        yield node
        if is_linear(node):
            node = operand(node)
        elif is_call(node, *_PRODUCTS) and (varying := _varying(node)) is not None:
            node = varying
        else:
            return


def _varying(node: fx.Node) -> fx.Node | None:
    """Return the one factor of a product that is not a constant over channels."""
    one, other = node.args[0], node.args[1]
    if is_call(node, aten.div.Tensor):
        return one if isinstance(one, fx.Node) and _is_constant(other) else None
    varying = [factor for factor in (one, other) if not _is_constant(factor)]
    return varying[0] if len(varying) == 1 and isinstance(varying[0], fx.Node) else None


def _is_constant(factor: object) -> bool:
    """Whether a factor is a number, or a parameter that has one number for each channel, or for all."""
    if not isinstance(factor, fx.Node):
        return isinstance(factor, int | float)
    value = factor.meta["val"]
    is_vector = value.dim() == 0 or value.numel() == value.shape[-1]
    return factor.op == "get_attr" and value.is_floating_point() and bool(is_vector)


def _apply(
    editor: Editor, node: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None] | Reject:
    """Return ``weight`` and ``bias`` of what ``node`` computes from a linear function with these."""
    if is_linear(node):
        parts = linear_parts(editor, node)
        if isinstance(parts, Reject):
            return parts
        matrix = parts.weight.double()
        own = None if parts.bias is None else parts.bias.double()
        return matrix @ weight, plus(None if bias is None else matrix @ bias, own)
    varying = _varying(node)
    factor = next(argument for argument in node.args[:2] if argument is not varying)
    constant = editor.constant(factor)
    scale = torch.tensor(factor, dtype=torch.float64) if constant is None else constant.double().flatten()
    if is_call(node, aten.div.Tensor):
        scale = 1 / scale
    # one channel times a vector is that vector for every one of its entries
    scaled = weight * scale.reshape(-1, 1)
    return scaled, None if bias is None else bias * scale


def _nonlinear(end: fx.Node, read: fx.Node) -> Reject | None:
    """Say of a branch that reads the same as the layer, but is not linear, why it stays."""
    if is_call(end, xf.activation) and read in walk(operand(end)) and operand(end) is not read:
        return Reject(
            f"the branch beside it has a {arguments(end)['function']} in its middle: it is no linear function, which a "
            f"weight could take up"
        )
    return None
