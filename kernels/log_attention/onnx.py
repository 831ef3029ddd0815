"""The ONNX form of ``xf.log_attention``: its three steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_HEADS = ("heads", "kv_heads")
_HIDING = (*_HEADS, "scale", "causal", "window_left", "window_right")
_LEVELS = ("bits", "numerator", "denominator", "round_table", "flush")


def steps(b: Builder, node: XfNode) -> ir.Value:
    """Weights, their rounding, and the sum of the values."""
    import onnx_ir as ir

    q, k = node["q"], node["k"]
    operands = [node[name] for name in ("q", "k", "key_mask", "bias", "key_log_size")]
    weights = b.xf("attention_weights", *operands, like=q, **{name: node[name] for name in _HIDING})
    weights.shape = ir.Shape([q.shape[0], node["heads"], q.shape[1], k.shape[1]])
    levels = {name: node[name] for name in _LEVELS}
    rounded = b.xf("log_quantize", weights, node["level_scale"], like=weights, **levels)
    heads = {name: node[name] for name in _HEADS}
    return b.xf("attention_values", rounded, node["v"], like=node.outputs[0], **heads)


FORMS = (Form("steps", steps, is_standard=True),)
