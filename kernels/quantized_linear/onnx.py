"""ONNX forms of ``xf.quantized_linear``; the weight is stored transposed, ``[I, O]``, as ONNX Runtime packs it.

Every form adds the same integers; they differ in what ONNX Runtime does in one pass over memory.  Where several layers
read one value, the forms with a quantization of their own share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import CONTRIB, Builder, Form, Verdict, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_FLOAT = 1


def dynamic_matmul(b: Builder, node: XfNode) -> ir.Value:
    """Range, codes, product and bias in one operator."""
    weight = b.transposed(node["weight"])
    return b.op("DynamicQuantizeMatMul", node["x"], weight, node["scale"], None, node["bias"], domain=CONTRIB)


def dynamic_integers(b: Builder, node: XfNode) -> ir.Value:
    """Codes by an operator of their own, which layers on one value share, then the integer product."""
    codes, scale, zero = b.ops("DynamicQuantizeLinear", node["x"], outputs=3)
    return _integer_product(b, node, codes, scale, zero)


def static_matmul(b: Builder, node: XfNode) -> ir.Value:
    """Codes in the calibrated range, then product, scaling and bias in one operator."""
    scale, zero = node["x_scale"], node["x_zero"]
    codes = b.op("QuantizeLinear", node["x"], scale, zero)
    operands = (codes, b.transposed(node["weight"]), scale, node["scale"], zero, None, node["bias"])
    return b.op("MatMulIntegerToFloat", *operands, domain=CONTRIB)


def static_integers(b: Builder, node: XfNode) -> ir.Value:
    """Codes in the calibrated range, then the integer product of the standard."""
    codes = b.op("QuantizeLinear", node["x"], node["x_scale"], node["x_zero"])
    return _integer_product(b, node, codes, node["x_scale"], node["x_zero"])


def quantize_dequantize(b: Builder, node: XfNode) -> ir.Value:
    """A product in floats between quantizations: what runtimes look for and turn into integers themselves."""
    scale, zero = node["x_scale"], node["x_zero"]
    x = b.op("DequantizeLinear", b.op("QuantizeLinear", node["x"], scale, zero), scale, zero)
    no_shift = b.constant(np.zeros(node.size("weight", 0), np.int8))
    weight = b.op("DequantizeLinear", b.transposed(node["weight"]), node["scale"], no_shift, axis=1)
    return _biased(b, node, b.op("MatMul", x, weight))


def _integer_product(b: Builder, node: XfNode, codes: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    total = b.op("MatMulInteger", codes, b.transposed(node["weight"]), zero)
    step = b.op("Mul", scale, node["scale"])
    return _biased(b, node, b.op("Mul", b.op("Cast", total, to=_FLOAT), step))


def _biased(b: Builder, node: XfNode, product: ir.Value) -> ir.Value:
    return product if node["bias"] is None else b.op("Add", product, node["bias"])


def _is_dynamic(node: XfNode) -> Verdict:
    return None if node["x_scale"] is None else "the activations have a calibrated range"


def _is_static(node: XfNode) -> Verdict:
    return "the activations have no calibrated range" if node["x_scale"] is None else None


FORMS = (
    Form("dynamic_matmul", dynamic_matmul, _is_dynamic, is_for_processors=True),
    Form("dynamic_integers", dynamic_integers, _is_dynamic, is_standard=True),
    Form("static_matmul", static_matmul, _is_static, is_for_processors=True),
    Form("quantize_dequantize", quantize_dequantize, _is_static, is_standard=True),
    Form("static_integers", static_integers, _is_static, is_standard=True),
)
