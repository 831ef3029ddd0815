"""ONNX forms of ``xf.attention_packed``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.attention.onnx import repeated
from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode
from xformopt.kernels.onnx_tokens import ascending

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_END = np.iinfo(np.int64).max


def per_sequence(b: Builder, node: XfNode) -> ir.Value:
    """A loop over the sequences: ONNX Runtime's fused operator, without a mask, on the tokens of each.

    It is the faster for having no mask: with one, the operator falls back to a product and a softmax over all pairs.
    """
    q, k, v = node["q"], repeated(b, node, "k"), repeated(b, node, "v")
    starts, ends = _starts(b, node), _ends(b, node)
    last_keys = ends if node["keys"] is None else b.op("Add", starts, node["keys"])
    width = node["heads"] * node.size("v", 2) // node["kv_heads"]

    def attend(inner: Builder, number: ir.Value) -> ir.Value:
        place = inner.op("Unsqueeze", number, inner.constant([0], np.int64))
        start, end, last = (inner.op("Gather", bounds, place, axis=0) for bounds in (starts, ends, last_keys))
        axis = inner.constant([1], np.int64)
        queries = inner.op("Slice", q, start, end, axis)
        sees = inner.op("Greater", inner.op("Squeeze", last), inner.op("Squeeze", start))

        def attention(branch: Builder) -> ir.Value:
            keys, values = (branch.op("Slice", of, start, last, axis) for of in (k, v))
            return branch.op(
                "MultiHeadAttention",
                queries,
                keys,
                values,
                domain=CONTRIB,
                num_heads=node["heads"],
                scale=node["scale"],
                unidirectional=int(node["causal"]),
            )

        def zeros(branch: Builder) -> ir.Value:
            count = branch.op("Shape", queries, start=1, end=2)
            one, wide = branch.constant([1], np.int64), branch.constant([width], np.int64)
            return branch.op("Expand", branch.scalar(0.0, q), branch.op("Concat", one, count, wide, axis=0))

        return inner.either(sees, attention, zeros, like=q)

    return b.collect(attend, b.op("Squeeze", b.op("Shape", starts)), like=q, axis=1)


def _has_no_guests(node: XfNode) -> Verdict:
    if node["causal"] and node["keys"] is not None:
        return "causal attention inside a sequence of which some tokens are no keys needs a mask"
    return None


def padded(b: Builder, node: XfNode) -> ir.Value:
    """``xf.attention`` on the sequences padded to the longest of them."""
    import onnx_ir as ir

    starts = _starts(b, node)
    lengths = b.op("Sub", _ends(b, node), starts)
    # a batch of padding alone: products over no tokens at all are not defined in every runtime
    longest = b.op("Max", b.op("ReduceMax", lengths, keepdims=1), b.constant([1], np.int64))
    steps = ascending(b, b.constant(0, np.int64), longest)
    column = b.constant([1], np.int64)
    is_token = b.op("Less", steps, b.op("Unsqueeze", lengths, column))  # [B, M]
    is_key = is_token if node["keys"] is None else b.op("Less", steps, b.op("Unsqueeze", node["keys"], column))
    # what lies behind the last token is one more row, of zeros
    behind = b.op("Shape", node["q"], start=1, end=2)
    places = b.op("Min", b.op("Add", b.op("Unsqueeze", starts, column), steps), behind)
    first = b.constant([0], np.int64)
    operands = []
    for name in ("q", "k", "v"):
        zeros = b.op("Expand", b.scalar(0.0, node[name]), b.constant([1, node.size(name, 2)], np.int64))
        tokens = b.op("Concat", b.op("Squeeze", node[name], first), zeros, axis=0)
        rows = b.op("Gather", tokens, places, axis=0)
        rows.shape, rows.type = ir.Shape(["sequences", "longest", node.size(name, 2)]), node[name].type
        operands.append(rows)
    width = node["heads"] * node.size("v", 2) // node["kv_heads"]
    attributes = {name: node[name] for name in ("heads", "kv_heads", "scale")}
    causal = int(node["causal"])
    attended = b.xf("attention", *operands, is_key, like=operands[0], width=width, causal=causal, **attributes)
    found = b.op("NonZero", is_token)
    rows, columns = (b.op("Gather", found, b.constant(axis, np.int64), axis=0) for axis in (0, 1))
    back = b.op("Add", b.op("Mul", rows, longest), columns)
    return b.op("Gather", b.reshape(attended, 1, -1, width), back, axis=1)


FORMS = (Form("per_sequence", per_sequence, _has_no_guests), Form("padded", padded, is_standard=True))


def _starts(b: Builder, node: XfNode) -> ir.Value:
    return b.op("Slice", node["offsets"], *(b.constant([n], np.int64) for n in (0, -1)))


def _ends(b: Builder, node: XfNode) -> ir.Value:
    return b.op("Slice", node["offsets"], *(b.constant([n], np.int64) for n in (1, _END)))
