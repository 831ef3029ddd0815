"""The ONNX form of ``xf.hamming_attention``: the codes as numbers, for runtimes add by multiplying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_packing import unpacked
from xformopt.kernels.packing import packed_size

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]


def features(b: Builder, node: XfNode) -> ir.Value:
    """Linear attention of features of -1 and 1, and one whose product is the number of bits."""
    q, k = (_features(b, node, name, last) for name, last in (("q", node["bits"]), ("k", 1)))
    return b.xf(
        "linear_attention",
        q,
        k,
        node["v"],
        node["key_mask"],
        None,
        like=node.outputs[0],
        heads=node["heads"],
        feature="given",
        causal=node["causal"],
        normalize=True,
        eps=node["eps"],
    )


def _features(b: Builder, node: XfNode, name: str, last: int) -> ir.Value:
    import onnx_ir as ir

    heads, bits, v = node["heads"], node["bits"], node["v"]
    codes = b.reshape(node[name], 0, 0, heads, packed_size(bits, 1))
    signs = b.op("Sub", b.op("Mul", unpacked(b, codes, 3, 1, bits), b.constant(2.0)), b.constant(1.0))
    padded = b.op("Pad", signs, b.constant([0] * 7 + [1], np.int64), b.constant(float(last)))
    flat = b.op("CastLike", b.reshape(padded, 0, 0, heads * (bits + 1)), v)
    flat.shape, flat.type = ir.Shape([*list(node[name].shape)[:2], heads * (bits + 1)]), v.type
    return flat


FORMS = (Form("features", features, is_standard=True),)
