"""ONNX forms of ``xf.attention``.

A query that sees no key gets zeros from ``matmul_softmax``, as the definition says.  The fused operators give it some
finite value instead; such a query is padding wherever the key mask is the padding mask of the same sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.attention.reference import visible_keys
from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS", "repeated", "values_of", "weights_of"]

# far below any logit, and far enough above the lowest number that a sum stays finite
_HIDDEN = {2: -3.0e4, 4: -1.0e30, 8: -1.0e30}
# beyond this many pairs a positional mask is computed at run time
_MAX_STORED_MASK = 1 << 20
_ADDED = ("bias", "key_log_size")
_INT32 = 6  # TensorProto.INT32


def attention(b: Builder, node: XfNode) -> ir.Value:
    """The standard operator, which works on the heads where they lie; all masks become one tensor."""
    is_causal = _is_plainly_causal(node) and all(node[name] is None for name in ("key_mask", *_ADDED))
    visible = None if is_causal else _visible(b, node)
    if any(node[name] is not None for name in _ADDED):
        mask = _added(b, node, visible)
    else:
        mask = None if visible is None else _over_pairs(b, node, visible)
    return b.op(
        "Attention",
        node["q"],
        node["k"],
        node["v"],
        mask,
        q_num_heads=node["heads"],
        kv_num_heads=node["kv_heads"],
        scale=node["scale"],
        is_causal=int(is_causal),
    )


def multi_head_attention(b: Builder, node: XfNode) -> ir.Value:
    """ONNX Runtime's fused operator: key/value heads are repeated for it, other positions than causal become a bias."""
    key_mask = node["key_mask"]
    is_causal = _is_plainly_causal(node)
    return b.op(
        "MultiHeadAttention",
        node["q"],
        repeated(b, node, "k"),
        repeated(b, node, "v"),
        None,
        None if key_mask is None else b.op("Cast", key_mask, to=_INT32),
        _added(b, node, None if is_causal else _positions(b, node)),
        domain=CONTRIB,
        num_heads=node["heads"],
        scale=node["scale"],
        unidirectional=int(is_causal),
        mask_filter_value=_hidden(node),
    )


def group_query_attention(b: Builder, node: XfNode) -> ir.Value:
    """ONNX Runtime's operator for decoders: causal, key/value heads fewer, no padding."""
    q, k = node["q"], node["k"]
    length = b.size(q, 1)
    last = b.op("Cast", b.op("Sub", length, b.constant([1], np.int64)), to=_INT32)
    total = b.op("Cast", b.op("Squeeze", length), to=_INT32)
    lengths = b.op("Expand", last, b.size(q, 0))
    window = node["window_left"]
    return b.op(
        "GroupQueryAttention",
        q,
        k,
        node["v"],
        None,
        None,
        lengths,
        total,
        domain=CONTRIB,
        num_heads=node["heads"],
        kv_num_heads=node["kv_heads"],
        scale=node["scale"],
        local_window_size=-1 if window < 0 else window + 1,
    )


def _is_decoder(node: XfNode) -> Verdict:
    if not _is_plainly_causal(node):
        return "it is always causal, over as many keys as queries"
    for name in ("key_mask", "bias", "key_log_size"):
        if node[name] is not None:
            return f"it takes no {name}"
    if _depth(node, "k") != _depth(node, "v") or _depth(node, "k") % 8:
        return "it wants one head width for keys and values, a multiple of eight"
    return None


def matmul_softmax(b: Builder, node: XfNode) -> ir.Value:
    """The definition: two products and a softmax."""
    visible = _visible(b, node)
    attended = _weighted(b, node, _softmax(b, node, visible))
    if (sees := _sees_a_key(b, node, visible)) is not None:
        attended = b.op("Mul", attended, sees)
    return _joined(b, node, attended)


def weights_of(b: Builder, node: XfNode) -> ir.Value:
    """Return the softmax of scaled and masked products, ``[B, H, T, S]``; zeros for a query that sees no key."""
    visible = _visible(b, node)
    weights = _softmax(b, node, visible)
    sees = _sees_a_key(b, node, visible)
    return weights if sees is None else b.op("Mul", weights, sees)


def values_of(b: Builder, node: XfNode) -> ir.Value:
    """Return the values weighted by given weights, ``[B, T, H * E]``."""
    return _joined(b, node, _weighted(b, node, node["weights"]))


def _weighted(b: Builder, node: XfNode, weights: ir.Value) -> ir.Value:
    """Return ``weights v`` per head, ``[B, H, T, E]``."""
    v = repeated(b, node, "v")
    return b.op("MatMul", weights, _split_heads(b, v, node["heads"], _depth(node, "v"), [0, 2, 1, 3]))


def _softmax(b: Builder, node: XfNode, visible: ir.Value | None) -> ir.Value:
    heads, depth = node["heads"], _depth(node, "k")
    scaled = b.op("Mul", node["q"], b.scalar(node["scale"], node["q"]))
    queries = _split_heads(b, scaled, heads, depth, [0, 2, 1, 3])  # [B, H, T, D]
    keys = _split_heads(b, repeated(b, node, "k"), heads, depth, [0, 2, 3, 1])  # [B, H, D, S]
    logits = b.op("MatMul", queries, keys)
    for term in _terms(b, node, visible):
        logits = b.op("Add", logits, term)
    return b.op("Softmax", logits, axis=-1)


def _sees_a_key(b: Builder, node: XfNode, visible: ir.Value | None) -> ir.Value | None:
    """Return 1 for queries that see a key and 0 for others, ``[1 or B, 1, 1 or T, 1]``; None where all do."""
    if visible is None or _always_sees_a_key(node):
        return None
    return b.op("ReduceMax", b.op("Cast", visible, to=int(node["q"].dtype)), b.constant([-1], np.int64), keepdims=1)


def _joined(b: Builder, node: XfNode, attended: ir.Value) -> ir.Value:
    return b.reshape(b.op("Transpose", attended, perm=[0, 2, 1, 3]), 0, 0, node["heads"] * _depth(node, "v"))


FORMS = (
    Form("attention", attention, is_standard=True),
    Form("multi_head_attention", multi_head_attention),
    Form("group_query_attention", group_query_attention, _is_decoder, is_for_processors=True),
    Form("matmul_softmax", matmul_softmax, is_standard=True),
)


def _depth(node: XfNode, name: str) -> int:
    return node.size(name, -1) // int(node["kv_heads"])


def _hidden(node: XfNode) -> float:
    return _HIDDEN[node["q"].dtype.itemsize]


def _is_plainly_causal(node: XfNode) -> bool:
    is_square = node.shape("q")[1] == node.shape("k")[1]
    return bool(node["causal"]) and is_square and node["window_left"] < 0


def _always_sees_a_key(node: XfNode) -> bool:
    # every window holds the diagonal, which exists where there are as many keys as queries
    return node["key_mask"] is None and node.shape("q")[1] == node.shape("k")[1]


def repeated(b: Builder, node: XfNode, name: str) -> ir.Value:
    """Return keys or values with one head for each query head."""
    kv_heads, group = node["kv_heads"], node["heads"] // node["kv_heads"]
    value: ir.Value = node[name]
    if group == 1:
        return value
    depth = _depth(node, name)
    apart = b.reshape(value, 0, 0, kv_heads, 1, depth)
    repeated = b.op("Expand", apart, b.constant([1, 1, 1, group, 1], np.int64))
    return b.reshape(repeated, 0, 0, kv_heads * group * depth)


def _split_heads(b: Builder, value: ir.Value, heads: int, depth: int, perm: list[int]) -> ir.Value:
    return b.op("Transpose", b.reshape(value, 0, 0, heads, depth), perm=perm)


def _positions(b: Builder, node: XfNode) -> ir.Value | None:
    """Return which key each query sees by position, ``[1, 1, T, S]``, or None for all."""
    causal, left, right = node["causal"], node["window_left"], node["window_right"]
    if not causal and left < 0 and right < 0:
        return None
    T, S = node.shape("q")[1], node.shape("k")[1]
    if isinstance(T, int) and isinstance(S, int) and T * S <= _MAX_STORED_MASK:
        return b.constant(visible_keys(T, S, causal, left, right).numpy()[None, None])
    zero, one = b.constant(0, np.int64), b.constant(1, np.int64)
    rows, columns = (b.op("Squeeze", b.size(node[name], 1)) for name in ("q", "k"))
    diagonal = b.op("Range", b.op("Sub", columns, rows), columns, one)
    keys = b.op("Range", zero, columns, one)
    distance = b.op("Sub", keys, b.op("Unsqueeze", diagonal, b.constant([0, 1, 3], np.int64)))
    bounds = [b.op("LessOrEqual", distance, zero)] if causal else []
    if left >= 0:
        bounds.append(b.op("GreaterOrEqual", distance, b.constant(-left, np.int64)))
    if right >= 0 and not causal:
        bounds.append(b.op("LessOrEqual", distance, b.constant(right, np.int64)))
    return bounds[0] if len(bounds) == 1 else b.op("And", *bounds)


def _visible(b: Builder, node: XfNode) -> ir.Value | None:
    """Return which key each query sees, ``[1 or B, 1, 1 or T, S]``, or None for all."""
    positions, key_mask = _positions(b, node), node["key_mask"]
    if key_mask is None:
        return positions
    keys = b.op("Unsqueeze", key_mask, b.constant([1, 2], np.int64))
    return keys if positions is None else b.op("And", keys, positions)


def _terms(b: Builder, node: XfNode, visible: ir.Value | None) -> list[ir.Value]:
    """Return what is added to the logits, each with four axes and finite: a whole row of infinities has no softmax."""
    q, bias, log_size = node["q"], node["bias"], node["key_log_size"]
    terms: list[ir.Value] = []
    if visible is not None:
        terms.append(b.op("Where", visible, b.scalar(0.0, q), b.scalar(_hidden(node), q)))
    if bias is not None:
        missing = 4 - len(node.shape("bias"))
        if missing:
            bias = b.op("Unsqueeze", bias, b.constant(list(range(missing)), np.int64))
        terms.append(b.op("Max", bias, b.scalar(_hidden(node), q)))
    if log_size is not None:
        terms.append(b.op("Unsqueeze", log_size, b.constant([1, 2], np.int64)))
    return terms


def _added(b: Builder, node: XfNode, visible: ir.Value | None) -> ir.Value | None:
    """Return the sum of all that is added to the logits, ``[1 or B, 1 or H, T, S]``, or None for nothing."""
    terms = _terms(b, node, visible)
    if not terms:
        return None
    total = terms[0]
    for term in terms[1:]:
        total = b.op("Add", total, term)
    pairs = (node.shape("q")[1], node.shape("k")[1])
    is_over_pairs = node["bias"] is not None and node.shape("bias")[-2:] == pairs
    return total if is_over_pairs else _over_pairs(b, node, total)


def _over_pairs(b: Builder, node: XfNode, value: ir.Value) -> ir.Value:
    """Expand the last two axes to queries and keys: the fused operators do not broadcast them."""
    sizes = b.op("Concat", b.constant([1, 1], np.int64), b.size(node["q"], 1), b.size(node["k"], 1), axis=0)
    return b.op("Expand", value, sizes)
