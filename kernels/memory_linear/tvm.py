"""TVM kernel of ``xf.memory_linear``: a row of x is hashed once, then its rows of all tables are summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import flat, registers, room, starts, write_function
from xformopt.kernels.tvm_math import exp

__all__ = ["KERNEL", "memory_linear"]

# vectors that the sums of a task fill
_VECTORS = 4


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["x"].dtype != torch.float32 or arguments["tables"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["x"].dim() > 1 else "x is one vector"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, x_shape, tables = node.arguments, node.shape_of("x"), node.shape_of("tables")
    has_bias, temperature = given["bias"] is not None, float(given["temperature"])
    written = f"{temperature:.9g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})
    name = "_".join(["memory_linear", *map(str, (*x_shape, *tables, int(has_bias))), written])
    operands = [b.value(given[name]) for name in ("x", "tables", *(["bias"] if has_bias else []))]
    lanes = b.machine.lanes
    return b.call(
        name, lambda: memory_linear(x_shape, tables, temperature, lanes, has_bias=has_bias), operands, node.shape
    )


def memory_linear(
    x_shape: tuple[int, ...], tables_shape: tuple[int, ...], temperature: float, lanes: int, *, has_bias: bool
) -> Any:
    """Return the function of x ``[..., K * b]``, tables ``[K, 2^b, O]`` and the bias ``[O]`` where it has one."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    count, _, outputs = tables_shape
    rows, width = int(np.prod(x_shape[:-1])), x_shape[-1] // count
    columns = min(_VECTORS * lanes, outputs)

    def body(*buffers: Any) -> None:
        x, y = flat(buffers[0], (rows, count, width)), flat(buffers[-1], (rows, outputs))
        tables, bias = ir.buffer_proxy(buffers[1]), ir.buffer_proxy(buffers[2]) if has_bias else None
        with ir.parallel(0, rows) as row:
            places, sureness = room((count,), "int32"), room((count,))
            with ir.serial(0, count) as k:
                place, denominator = tirx.const(0, "int32"), ir.float32(1.0)
                for bit in range(width):
                    z = x[row, k, bit]
                    is_set = tirx.Select(z >= ir.float32(0.0), tirx.const(1 << bit, "int32"), tirx.const(0, "int32"))
                    place = place + is_set
                    denominator = denominator * (ir.float32(1.0) + exp(tirx.abs(z) * ir.float32(-2 / temperature)))
                places[k] = place
                sureness[k] = ir.float32(1.0) / denominator
            with ir.serial(0, -(-outputs // columns)) as part:
                column = starts(part, columns, outputs)
                (sums,) = registers(1, columns)
                with ir.serial(0, count) as k, ir.vectorized(0, columns) as j:
                    sums[j] = sums[j] + sureness[k] * tables[k, places[k], column + j]
                with ir.vectorized(0, columns) as j:
                    y[row, column + j] = sums[j] if bias is None else sums[j] + bias[column + j]

    operands = [
        ("x", x_shape, "float32"),
        ("tables", tables_shape, "float32"),
        *([("bias", (outputs,), "float32")] if has_bias else []),
        ("y", (*x_shape[:-1], outputs), "float32"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
