"""ONNX forms of ``xf.flow_attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_chunks import running_sum
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def sums(b: Builder, node: XfNode) -> ir.Value:
    """Flows by sums over the tokens (running sums where causal), then linear attention."""
    heads, like, width = node["heads"], node["q"], node.size("v", -1)
    one = b.scalar(1.0, like)
    queries, keys = _existing(b, node, "q", "query_mask"), _existing(b, node, "k", "key_mask")
    q = _heads(b, node, b.op("Sigmoid", node["q"]), "q", queries)
    k = _heads(b, node, b.op("Sigmoid", node["k"]), "k", keys)
    T, S = (_count(b, node, name, exists) for name, exists in (("q", queries), ("k", keys)))
    incoming = b.op("Div", one, _product(b, node, q, _total(b, node, k)))
    outgoing = b.op("Div", one, _product(b, node, k, _total(b, node, q)))
    if node["causal"]:
        sent, received = b.op("Mul", outgoing, S), b.op("Mul", incoming, S)
        conserved_in = b.op("Div", _product(b, node, q, _total(b, node, b.op("Mul", k, sent))), S)
        conserved_out = b.op("Div", _product(b, node, k, _total(b, node, b.op("Mul", q, received))), S)
    else:
        conserved_in = _product(b, node, q, _total(b, node, b.op("Mul", k, outgoing)))
        conserved_in = b.op("Mul", conserved_in, b.op("Div", T, b.op("Max", S, one)))
        conserved_out = _product(b, node, k, _total(b, node, b.op("Mul", q, incoming)))
    strength = b.op("Exp", b.op("Clip", conserved_out, b.scalar(-1.0, like), one))
    if keys is not None:
        strength = b.op("Mul", strength, keys)
    total = b.op("Max", _total(b, node, strength), b.scalar(float(np.finfo(like.dtype.numpy()).tiny), like))
    competition = b.op("Mul", b.op("Div", strength, total), S)
    values = b.op("Mul", b.reshape(node["v"], 0, 0, heads, width // heads), competition)
    operands = [b.reshape(x, 0, 0, -1) for x in (b.op("Mul", q, incoming), k, values)]
    for operand, name in zip(operands, ("q", "k", "v"), strict=True):
        operand.shape, operand.type = node[name].shape, node[name].type
    mixed = b.xf(
        "linear_attention",
        operands[0],
        operands[1],
        operands[2],
        like=like,
        width=width,
        heads=heads,
        feature="given",
        causal=int(node["causal"]),
        normalize=0,
    )
    allocated = b.op("Mul", b.reshape(mixed, 0, 0, heads, width // heads), b.op("Sigmoid", conserved_in))
    return b.reshape(allocated, 0, 0, width)


FORMS = (Form("sums", sums, is_standard=True),)


def _existing(b: Builder, node: XfNode, name: str, mask: str) -> ir.Value | None:
    """Return ones and zeros ``[B, T, 1, 1]``, or None for ones."""
    if node[mask] is None:
        return None
    return b.op("Cast", b.op("Unsqueeze", node[mask], b.constant([2, 3], np.int64)), to=int(node[name].dtype))


def _heads(b: Builder, node: XfNode, x: ir.Value, name: str, exists: ir.Value | None) -> ir.Value:
    apart = b.reshape(x, 0, 0, node["heads"], node.size(name, -1) // node["heads"])  # [B, T, H, D]
    return apart if exists is None else b.op("Mul", apart, exists)


def _total(b: Builder, node: XfNode, x: ir.Value) -> ir.Value:
    """Sum over the tokens: all of them, or those so far."""
    if node["causal"]:
        return running_sum(b, x, 1)
    return b.op("ReduceSum", x, b.constant([1], np.int64), keepdims=1)


def _count(b: Builder, node: XfNode, name: str, exists: ir.Value | None) -> ir.Value:
    """Return how many tokens there are, ``[B or 1, 1 or T, 1, 1]``; at least one where causal."""
    like, one = node["q"], b.scalar(1.0, node["q"])
    if exists is not None:
        total = _total(b, node, exists)
        return b.op("Max", total, one) if node["causal"] else total
    length = b.size(node[name], 1)
    if not node["causal"]:
        return b.op("Cast", length, to=int(like.dtype))
    at = b.op(
        "Range",
        b.constant(1, np.int64),
        b.op("Add", b.op("Squeeze", length), b.constant(1, np.int64)),
        b.constant(1, np.int64),
    )
    return b.reshape(b.op("Cast", at, to=int(like.dtype)), 1, -1, 1, 1)


def _product(b: Builder, node: XfNode, x: ir.Value, total: ir.Value) -> ir.Value:
    """Multiply with a sum, both a little above zero, ``[B, T, H, 1]``."""
    eps = b.scalar(node["eps"], node["q"])
    both = b.op("Mul", b.op("Add", x, eps), b.op("Add", total, eps))
    return b.op("ReduceSum", both, b.constant([-1], np.int64), keepdims=1)
