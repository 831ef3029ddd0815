"""TVM kernel of ``xf.quantized_embedding``: the rows asked for are read as codes, and become floats one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import flat, write_function

__all__ = ["KERNEL", "lookup"]

_BYTE = 8


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    return None if arguments["scale"].dtype == torch.float32 else "it is not in fp32"


def _emit(b: Builder, node: TvmNode) -> Any:
    given = node.arguments
    names = ["weight", "indices", "scale", *(["zero"] if given["zero"] is not None else [])]
    shapes = [node.shape_of(name) for name in names]
    bits, kind = int(given["bits"]), str(given["indices"].meta["val"].dtype).removeprefix("torch.")
    name = "_".join(["quantized_embedding", kind, *map(str, (bits, *(size for shape in shapes for size in shape)))])
    operands = [b.value(given[name]) for name in names]
    return b.call(name, lambda: lookup(shapes, node.shape, bits, kind), operands, node.shape)


def lookup(shapes: list[tuple[int, ...]], shape: tuple[int, ...], bits: int, kind: str) -> Any:
    """Return the function of the packed table ``[V, bytes]``, indices, scales and zero points where there are some.

    An index beyond the table reads its nearest row, so that no memory but the table is read.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    (entries, size), (_, groups) = shapes[0], shapes[2]
    count, width = int(np.prod(shapes[1])), shape[-1]
    per_byte, members = _BYTE // bits, width // groups

    def code(packed: Any, row: Any, place: Any) -> Any:
        """Return the code at a place of a row as an integer."""
        byte = packed[row, place // per_byte].astype("int32")
        return byte >> place % per_byte * bits & (1 << bits) - 1

    def body(*buffers: Any) -> None:
        weight, scale = (ir.buffer_proxy(buffers[place]) for place in (0, 2))
        indices, y = flat(buffers[1], (count,)), flat(buffers[-1], (count, width))
        zero = ir.buffer_proxy(buffers[3]) if len(shapes) > 3 else None
        with ir.parallel(0, count) as n, ir.serial(0, groups) as group, ir.serial(0, members) as j:
            row = tirx.max(tirx.min(indices[n].astype("int32"), entries - 1), 0)
            of_zero = tirx.const(2 ** (bits - 1), "int32") if zero is None else code(zero, row, group)
            steps = code(weight, row, group * members + j) - of_zero
            y[n, group * members + j] = steps.astype("float32") * scale[row, group]

    operands = [
        ("weight", (entries, size), "uint8"),
        ("indices", shapes[1], kind),
        ("scale", (entries, groups), "float32"),
        *([("zero", shapes[3], "uint8")] if len(shapes) > 3 else []),
        ("y", shape, "float32"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
