"""TVM kernel of ``xf.pack_bits``."""

from __future__ import annotations

from typing import Any

import numpy as np

from xformopt.kernels.packing import packed_size
from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode
from xformopt.kernels.tvm_loops import flat, write_function

__all__ = ["KERNEL", "packed"]

_BYTE = 8


def _emit(b: Builder, node: TvmNode) -> Any:
    shape = node.shape_of("bits")
    name = "_".join(["pack_bits", *map(str, shape)])
    return b.call(name, lambda: packed(shape), [b.value(node.arguments["bits"])], node.shape, dtype="uint8")


def packed(shape: tuple[int, ...]) -> Any:
    """Return the function of bits ``[..., N]``."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    rows, count = int(np.prod(shape[:-1])), shape[-1]
    size = packed_size(count, 1)

    def body(bits: Any, codes: Any) -> None:
        bits, codes = flat(bits, (rows, count)), flat(codes, (rows, size))
        with ir.parallel(0, rows) as row:
            for byte in range(size):
                value = tirx.const(0, "int32")
                for place in range(min(_BYTE, count - byte * _BYTE)):
                    value = value | bits[row, byte * _BYTE + place].astype("int32") << place
                codes[row, byte] = value.astype("uint8")

    return write_function([("bits", shape, "bool"), ("codes", (*shape[:-1], size), "uint8")], body)


KERNEL = Kernel(_emit)
