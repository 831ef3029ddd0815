"""The ONNX form of ``xf.pack_bits``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xformopt.kernels.onnx_form import Builder, Form, XfNode

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["FORMS"]

_FLOAT, _UINT8, _BYTE = 1, 2, 8


def weighted_sum(b: Builder, node: XfNode) -> ir.Value:
    """Each bit times what its place is worth, summed by a product of matrices."""
    bits, axes = node["bits"], len(node.shape("bits"))
    count = node.size("bits", -1)
    numbers = b.op("Cast", bits, to=_FLOAT)
    if missing := -count % _BYTE:
        numbers = b.op("Pad", numbers, b.constant([0] * (2 * axes - 1) + [missing], np.int64))
    rows = b.reshape(numbers, *[0] * (axes - 1), -1, _BYTE)
    worth = b.constant(2.0 ** np.arange(_BYTE).reshape(_BYTE, 1), np.float32)
    packed = b.reshape(b.op("MatMul", rows, worth), *[0] * (axes - 1), -1)
    return b.op("Cast", packed, to=_UINT8)


FORMS = (Form("weighted_sum", weighted_sum, is_standard=True),)
