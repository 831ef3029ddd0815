"""The ONNX form of ``xf.block_parameter``; all of it is constant, so that runtimes compute it when they load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode
from xformopt.kernels.onnx_packing import unpacked

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_INT64 = 7
# exponents of int8
_LOWEST, _HIGHEST = -128, 127


def table_of_powers(b: Builder, node: XfNode) -> ir.Value:
    """Codes times powers from a table, the last block filled up."""
    bits, block, shape = int(node["bits"]), int(node["block"]), [int(size) for size in node["shape"]]
    count, blocks = math.prod(shape), node.size("exponents", 0)
    row = b.reshape(node["codes"], 1, -1)
    codes = b.op("Sub", unpacked(b, row, 1, bits, count), b.constant(np.float32(2 ** (bits - 1))))
    if missing := blocks * block - count:
        codes = b.op("Pad", codes, b.constant([0, 0, 0, missing], np.int64))
    table = b.constant(np.exp2(np.arange(_LOWEST, _HIGHEST + 1, dtype=np.float64)), np.float32)
    places = b.op("Sub", b.op("Cast", node["exponents"], to=_INT64), b.constant(_LOWEST, np.int64))
    values = b.op("Mul", b.reshape(codes, blocks, block), b.reshape(b.op("Gather", table, places), blocks, 1))
    ends = [b.constant([number], np.int64) for number in (0, count, 0)]
    return b.reshape(b.op("Slice", b.reshape(values, -1), *ends), *shape)


FORMS = (Form("table_of_powers", table_of_powers, is_standard=True),)
