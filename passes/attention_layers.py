"""Which linear layers belong to attention: those that make queries, keys and values, and those behind it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from xformopt.match import arguments, is_call, readers, xf
from xformopt.program import Program

__all__ = ["attention_linears"]

aten = torch.ops.aten
_LINEAR = (xf.linear, xf.linear_activation)
_ATTENTION = (
    xf.attention,
    xf.flow_attention,
    xf.hamming_attention,
    xf.linear_attention,
    xf.local_attention,
    xf.toeplitz_attention,
    xf.windowed_linear_attention,
)
# what may stand between a projection and attention
_BETWEEN = (
    xf.rope,
    xf.rms_norm,
    xf.layer_norm,
    operator.getitem,
    aten.slice.Tensor,
    aten.split_with_sizes.default,
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.mul.Tensor,
)


def attention_linears(program: Program) -> set[str]:
    """Return the names of linear layers that feed the queries, keys or values of attention, or read its result."""
    found: set[str] = set()
    for node in program.nodes():
        if is_call(node, *_ATTENTION):
            given = arguments(node)
            for name in ("q", "k", "v"):
                found |= _before(given[name])
            found |= _behind(node)
    return found


def _before(node: fx.Node) -> set[str]:
    if is_call(node, *_LINEAR):
        return {node.name}
    if not is_call(node, *_BETWEEN):
        return set()
    return {name for source in node.all_input_nodes for name in _before(source)}


def _behind(node: fx.Node) -> set[str]:
    found: set[str] = set()
    for reader in readers(node):
        if is_call(reader, *_LINEAR) and reader.args[0] is node:
            found.add(reader.name)
        elif is_call(reader, *_BETWEEN):
            found |= _behind(reader)
    return found
