"""The links of a whole program: the rules of the dialect's operators, and what becomes of operators without a rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from xformopt.analysis.axis_moves import MOVES
from xformopt.analysis.links import Links, rank, sizes
from xformopt.match import arguments, xf
from xformopt.program import Program
from xformopt.program.text import target_name

__all__ = ["find_links"]

aten = torch.ops.aten


def find_links(program: Program) -> Links:
    """Return what the operators of a lifted program link and pin; an operator without a rule pins what it touches."""
    links = Links()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            links.pin_all(node, f"it is an axis of the input {node.target}")
        elif node.op == "call_function":
            _link_operator(links, node)
    for spec, node in zip(program.outputs, program.results, strict=True):
        links.pin_all(node, f"it is an axis of the output {spec.name}")
    return links


def _link_operator(links: Links, node: fx.Node) -> None:
    rule = _RULES.get(node.target)
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = _pointwise
    if rule is not None:
        rule(links, node)
        return
    reason = f"{target_name(node.target)} (%{node.name}) is not known to work entry by entry"
    for value in (*node.all_input_nodes, node):
        links.pin_all(value, reason)


def _pointwise(links: Links, node: fx.Node) -> None:
    """Align the operands with the result from the right."""
    for value in node.all_input_nodes:
        shift = rank(node) - rank(value)
        for axis in range(rank(value)):
            links.equal((value, axis), (node, axis + shift))


def _leading(links: Links, x: fx.Node, out: fx.Node) -> None:
    for axis in range(rank(x) - 1):
        links.equal((x, axis), (out, axis))


def _linear(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    x, weight = given["x"], given["weight"]
    _leading(links, x, node)
    links.equal((x, rank(x) - 1), (weight, 1))
    links.equal((weight, 0), (node, rank(node) - 1))
    if given["bias"] is not None:
        links.equal((given["bias"], 0), (node, rank(node) - 1))


def _norm(links: Links, node: fx.Node) -> None:
    """A norm over groups goes by whole groups, which share its weight."""
    given = arguments(node)
    x, groups, last = given["x"], given["groups"], rank(node) - 1
    _leading(links, x, node)
    if groups > 1:
        links.blocks((x, last), (node, last), groups)
    else:
        links.equal((x, last), (node, last))
    for affine in (given["weight"], given.get("bias")):
        if affine is not None and groups > 1:
            links.pin(affine, 0, f"the groups of %{node.name} share it")
        elif affine is not None:
            links.equal((affine, 0), (node, last))


def _attention(links: Links, node: fx.Node) -> None:
    """A head goes with its key/value head and the other heads that this one serves; a lone key/value head stays."""
    given = arguments(node)
    q, k, v, heads, kv_heads = (given[name] for name in ("q", "k", "v", "heads", "kv_heads"))
    links.equal((q, 0), (node, 0))
    links.equal((q, 1), (node, 1))
    links.equal((k, 1), (v, 1))
    links.blocks((q, 2), (node, 2), heads)
    if kv_heads > 1:
        links.blocks((k, 2), (node, 2), kv_heads)
        links.blocks((v, 2), (node, 2), kv_heads)
    else:
        for shared in (k, v):
            links.pin(shared, 2, f"all heads of %{node.name} share one key/value head")
    bias = given["bias"]
    if isinstance(bias, fx.Node) and rank(bias) > 2 and sizes(bias)[-3] == heads and heads > 1:
        links.blocks((bias, rank(bias) - 3), (node, 2), heads)


def _rope(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    _leading(links, given["x"], node)
    links.blocks((given["x"], 2), (node, 2), given["heads"])
    for angles in (given["cos"], given["sin"]):
        links.pin_all(angles, f"%{node.name} turns every head by the same angles")


def _patch_embedding(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    links.equal((given["image"], 1), (given["weight"], 1))
    links.equal((given["weight"], 0), (node, 2))
    if given["bias"] is not None:
        links.equal((given["bias"], 0), (node, 2))
    for axis in (2, 3):
        links.pin(given["image"], axis, f"%{node.name} cuts it in patches")
        links.pin(given["weight"], axis, "it is an axis of a kernel")


def _mean_pool(links: Links, node: fx.Node) -> None:
    links.equal((arguments(node)["x"], 2), (node, 1))


def _convolution(links: Links, node: fx.Node) -> None:
    """A channel of a depthwise convolution is one unit of input, kernel and output."""
    given = arguments(node)
    x, weight, bias, groups = (given[name] for name in ("input", "weight", "bias", "groups"))
    if groups == 1:
        links.equal((x, 1), (weight, 1))
    elif groups == sizes(weight)[0] == sizes(x)[1]:
        links.equal((x, 1), (weight, 0))
    else:
        for value in (x, weight):
            links.pin_all(value, f"%{node.name} is a convolution in groups")
    links.equal((weight, 0), (node, 1))
    if bias is not None:
        links.equal((bias, 0), (node, 1))
    for axis in range(2, rank(weight)):
        links.pin(weight, axis, "it is an axis of a kernel")
        links.pin(x, axis, f"%{node.name} convolves over it")
        links.pin(node, axis, f"%{node.name} convolves over it")


def _embedding(links: Links, node: fx.Node) -> None:
    given = arguments(node)
    table, indices = given["weight"], given["indices"]
    links.equal((table, 1), (node, rank(node) - 1))
    links.pin(table, 0, f"%{node.name} looks its rows up")
    for axis in range(rank(indices)):
        links.equal((indices, axis), (node, axis))


_RULES: dict[object, Callable[[Links, fx.Node], None]] = {
    xf.linear: _linear,
    xf.layer_norm: _norm,
    xf.rms_norm: _norm,
    xf.activation: _pointwise,
    xf.glu: _pointwise,
    xf.attention: _attention,
    xf.rope: _rope,
    xf.patch_embedding: _patch_embedding,
    xf.mean_pool: _mean_pool,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.embedding.default: _embedding,
    aten.expand.default: _pointwise,
    aten._to_copy.default: _pointwise,
    aten.clone.default: _pointwise,
    aten.alias.default: _pointwise,
    **MOVES,
}
