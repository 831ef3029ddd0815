"""The ONNX form of ``xf.log_quantize``: what every code stands for is computed beforehand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.log_quantize.reference import log_levels
from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_DOUBLE, _INT64 = 11, 7


def table_lookup(b: Builder, node: XfNode) -> ir.Value:
    """Codes by a logarithm in double precision, and a table with one entry for each of them."""
    x, bits = node["x"], node["bits"]
    codes = 2**bits
    scale = b.op("Cast", node["scale"], to=_DOUBLE)
    zero = b.scalar(0.0, x)
    clipped = b.op("Cast", b.op("Min", b.op("Max", x, zero), node["scale"]), to=_DOUBLE)
    factor = -node["denominator"] / node["numerator"] / math.log(2)
    exact = b.op("Mul", b.op("Log", b.op("Div", clipped, scale)), b.constant(factor, np.float64))
    # one entry more, for all that lies below the smallest level
    bounded = b.op("Clip", b.op("Round", exact), b.constant(0, np.float64), b.constant(codes, np.float64))
    known = log_levels(
        bits, node["numerator"], node["denominator"], round_table=node["round_table"], flush=node["flush"]
    )
    levels = b.op("Mul", b.constant(known.numpy(), np.float64), scale)
    found = b.op("Gather", levels, b.op("Cast", bounded, to=_INT64))
    value = b.op("Cast", found, to=int(x.dtype))
    return b.op("Where", b.op("IsNaN", x), x, value)


FORMS = (Form("table_lookup", table_lookup, is_standard=True),)
