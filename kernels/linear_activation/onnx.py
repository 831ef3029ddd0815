"""ONNX forms of ``xf.linear_activation``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_BIASED = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}


def apart(b: Builder, node: XfNode) -> ir.Value:
    """The linear layer, then the activation."""
    like = node.outputs[0]
    linear = b.xf("linear", node["x"], node["weight"], node["bias"], like=like)
    return b.xf("activation", linear, like=like, function=node["function"])


def biased_activation(b: Builder, node: XfNode) -> ir.Value:
    """The product, then ONNX Runtime's activation that adds the bias."""
    product = b.xf("linear", node["x"], node["weight"], like=node.outputs[0])
    return b.op(_BIASED[node["function"]], product, node["bias"], domain=CONTRIB)


def _takes_bias(node: XfNode) -> Verdict:
    if node["bias"] is None:
        return "there is no bias"
    return None if node["function"] in _BIASED else f"there is no biased {node['function']}"


FORMS = (
    Form("apart", apart, is_standard=True),
    Form("biased_activation", biased_activation, _takes_bias),
)
