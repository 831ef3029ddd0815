"""ONNX forms of ``xf.prefix_scan_attention``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.chunks import CHUNK
from xformopt.kernels.onnx_chunks import from_chunks, heads_in_chunks
from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_softmax import Weighted, distances, hide, mean_of, weighted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def two_levels(b: Builder, node: XfNode) -> ir.Value:
    """The prefixes of all chunks as one product each, and so those of the sequence of chunks."""
    heads, k, width = node["heads"], node["k"], node.size("v", -1)
    E = width // heads
    logits = heads_in_chunks(b, _logits(b, node), heads, 1)  # [B, H, N, C, 1]
    values = heads_in_chunks(b, node["v"], heads, E)
    row = b.op("Transpose", logits, perm=[0, 1, 2, 4, 3])
    inside = weighted(b, hide(b, row, b.constant(np.tri(CHUNK, dtype=bool)), k), values, k)
    last = b.constant(CHUNK - 1, np.int64)
    chunk = Weighted(*(b.op("Gather", x, last, axis=3) for x in inside))  # [B, H, N, .]
    peaks = b.op("Transpose", chunk.peak, perm=[0, 1, 3, 2])  # [B, H, 1, N]
    earlier = b.op("Greater", distances(b, b.op("Shape", peaks, start=3, end=4)), b.constant(0, np.int64))
    both = b.op("Concat", chunk.values, chunk.weights, axis=-1)
    before = weighted(b, hide(b, peaks, earlier, k), both, k)
    sums, weights = b.ops("Split", before.values, b.constant([E, 1], np.int64), outputs=2, axis=-1)
    behind = b.constant([3], np.int64)
    past = Weighted(*(b.op("Unsqueeze", x, behind) for x in (sums, weights, before.peak)))
    return from_chunks(b, mean_of(b, k, past, inside), k, width)


def _logits(b: Builder, node: XfNode) -> ir.Value:
    """Return the logit of each token, ``[B, T, H]``."""
    heads, k = node["heads"], node["k"]
    query = b.op("Mul", node["q"], b.scalar(node["scale"], k))
    products = b.reshape(b.op("Mul", k, query), 0, 0, heads, node.size("k", -1) // heads)
    logits = b.op("ReduceSum", products, b.constant([-1], np.int64), keepdims=0)
    if node["key_mask"] is not None:
        logits = hide(b, logits, b.op("Unsqueeze", node["key_mask"], b.constant([-1], np.int64)), k)
    return logits


FORMS = (Form("two_levels", two_levels, is_standard=True),)
