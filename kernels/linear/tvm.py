"""TVM kernel of ``xf.linear``, with bias and activation: register tiles over a weight packed in panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.tvm_form import Builder, Kernel, Machine, Tile, TvmNode, Verdict
from xformopt.kernels.tvm_loops import add_tile, flat, registers, room, starts, write_function
from xformopt.kernels.tvm_math import FUNCTIONS

__all__ = ["KERNEL", "accepts", "emit", "emit_product", "matmul", "pack", "tiles_of"]


def accepts(arguments: Mapping[str, Any]) -> Verdict:
    """Take fp32 with a weight of two axes."""
    if arguments["x"].dtype != torch.float32 or arguments["weight"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["x"].dim() > 1 else "x is one vector"


def emit(b: Builder, node: TvmNode) -> Any:
    """Emit the product over all positions as one matrix."""
    given = node.arguments
    return emit_product(
        b,
        b.value(given["x"]),
        node.shape_of("x"),
        given["weight"],
        given.get("bias"),
        node.shape,
        given.get("function"),
    )


def emit_product(
    b: Builder,
    x: Any,
    x_shape: tuple[int, ...],
    weight: Any,
    bias: Any,
    shape: tuple[int, ...],
    function: str | None = None,
) -> Any:
    """Emit ``function(x weight^T + bias)`` of a value ``[..., I]`` and nodes ``[O, ...]`` and ``[O]``."""
    inner, columns = x_shape[-1], shape[-1]
    rows = int(np.prod(x_shape[:-1]))

    def make(tile: Tile) -> Any:
        return matmul(x_shape, shape, tile, has_bias=bias is not None, function=function)

    kinds = [function or "", "bias" if bias is not None else ""]
    name = "_".join(["matmul", *map(str, (rows, inner, columns)), *filter(None, kinds)])
    tile = b.tile(name, make, Tile.of(b.machine, rows, columns), tiles_of(b.machine, rows, columns))
    operands = [x, _packed(b, weight, tile)]
    if bias is not None:
        operands.append(b.value(bias))
    name = "_".join([name, f"from{len(x_shape)}", f"to{len(shape)}"])
    return b.call(name, lambda: make(tile), operands, shape)


def tiles_of(machine: Machine, rows: int, columns: int) -> list[Tile]:
    """Return the tiles worth trying: as many sums as registers hold, beside one row of the panel and one factor."""
    found = []
    for vectors in (1, 2, 3, 4):
        width = vectors * machine.lanes
        for height in range(2, 31):
            sums = vectors * height
            if sums + vectors + 1 <= machine.registers and 2 * sums >= machine.registers:
                found.append(Tile.fitted(height, width, rows, columns))
    # few rows computed twice come first, should time run out; of equal ones, high tiles
    return sorted(set(found), key=lambda tile: (tile.waste(rows, columns), -tile.rows * tile.columns))


def _packed(b: Builder, weight: Any, tile: Tile) -> Any:
    """Return the panels of a weight: computed here where it is a parameter, by the graph where it is not."""
    constant = b.constants.get(weight)
    if constant is None:
        rows, *inner = (int(size) for size in weight.meta["val"].shape)
        size = int(np.prod(inner))
        name = f"pack_{rows}_{size}_{tile.columns}"
        shape = (-(-rows // tile.columns), size, tile.columns)
        return b.call(name, lambda: _pack_function(rows, inner, tile), [b.value(weight)], shape)
    return b.parameter(
        f"{weight.name} in panels of {tile.columns}",
        lambda: pack(constant.detach().numpy().reshape(len(constant), -1), tile.columns),
    )


def pack(weight: np.ndarray, width: int) -> np.ndarray:
    """Return a weight ``[O, I]`` as panels ``[ceil(O / width), I, width]``; the last begins where it fits."""
    rows = len(weight)
    first = [min(start, rows - width) for start in range(0, rows, width)]
    return np.stack([np.ascontiguousarray(weight[start : start + width].T) for start in first])


def matmul(
    x_shape: tuple[int, ...], shape: tuple[int, ...], tile: Tile, *, has_bias: bool, function: str | None
) -> Any:
    """Return the function ``function(x w + bias)`` of x ``[..., inner]`` and w in panels.

    Threads take tiles panel by panel; in a tile each step of the sum adds one row of the panel to all sums, which stay
    in registers until bias and activation are done.
    """
    from tvm.script.ir_builder import tirx as ir

    inner, columns = x_shape[-1], shape[-1]
    rows = int(np.prod(shape[:-1]))
    panels, stripes = -(-columns // tile.columns), -(-rows // tile.rows)

    def body(*buffers: Any) -> None:
        x, w, y = flat(buffers[0], (rows, inner)), ir.buffer_proxy(buffers[1]), flat(buffers[-1], (rows, columns))
        bias = ir.buffer_proxy(buffers[2]) if has_bias else None
        with ir.parallel(0, panels * stripes) as task:
            panel = task // stripes
            row, column = starts(task % stripes, tile.rows, rows), starts(panel, tile.columns, columns)
            sums = registers(tile.rows, tile.columns)
            with ir.serial(0, inner) as k:
                add_tile(sums, tile.columns, lambda i: x[row + i, k], lambda j: w[panel, k, j])
            # an activation needs many registers: row by row once those of the sums are free again, and not in y itself,
            # where another thread may be writing what tiles have in common
            held = room((tile.rows, tile.columns)) if function else None
            for i in range(tile.rows):
                with ir.vectorized(0, tile.columns) as j:
                    value = sums[i][j] if bias is None else sums[i][j] + bias[column + j]
                    if held is None:
                        y[row + i, column + j] = value
                    else:
                        held[i, j] = value
            if held is not None and function is not None:
                with ir.serial(0, tile.rows) as i, ir.vectorized(0, tile.columns) as j:
                    y[row + i, column + j] = FUNCTIONS[function](held[i, j])

    operands = [
        ("x", x_shape, "float32"),
        ("w", (panels, inner, tile.columns), "float32"),
        *([("bias", (columns,), "float32")] if has_bias else []),
        ("y", shape, "float32"),
    ]
    return write_function(operands, body)


def _pack_function(rows: int, inner: list[int], tile: Tile) -> Any:
    """Return the function that packs a weight the graph computes."""
    from tvm.script.ir_builder import tirx as ir

    size, width = int(np.prod(inner)), tile.columns
    panels = -(-rows // width)

    def body(weight: Any, packed: Any) -> None:
        weight, packed = flat(weight, (rows, size)), ir.buffer_proxy(packed)
        with ir.parallel(0, panels) as panel, ir.serial(0, size) as k, ir.serial(0, width) as j:
            packed[panel, k, j] = weight[starts(panel, width, rows) + j, k]

    return write_function([("weight", (rows, *inner), "float32"), ("packed", (panels, size, width), "float32")], body)


KERNEL = Kernel(emit, accepts)
