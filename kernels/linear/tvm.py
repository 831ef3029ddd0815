"""TVM kernel of ``xf.linear``, with bias and activation: register tiles over a weight packed in panels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xformopt.kernels.tvm_form import Builder, Kernel, Machine, TvmNode, Verdict
from xformopt.kernels.tvm_math import FUNCTIONS

__all__ = ["KERNEL", "Tile", "accepts", "emit", "matmul", "pack"]


@dataclass(frozen=True)
class Tile:
    """The part of the product that stays in registers: ``rows x columns``."""

    rows: int
    columns: int

    @staticmethod
    def default(machine: Machine, rows: int) -> Tile:
        """Two vectors wide, and as high as half of the registers hold; never higher than the product."""
        return Tile(min(rows, machine.registers // 4), 2 * machine.lanes)


def accepts(arguments: Mapping[str, Any]) -> Verdict:
    """Take fp32 with a weight of two axes."""
    if arguments["x"].dtype != torch.float32 or arguments["weight"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["x"].dim() > 1 else "x is one vector"


def emit(b: Builder, node: TvmNode) -> Any:
    """Emit the product over all positions as one matrix."""
    *leading, inner = node.shape_of("x")
    columns, rows = node.shape_of("weight")[0], int(np.prod(leading))
    function = node.arguments.get("function")
    bias = node.arguments.get("bias")
    tile = Tile.default(b.machine, rows)
    operands = [b.reshape(b.value(node.arguments["x"]), (rows, inner)), _packed(b, node.arguments["weight"], tile)]
    if bias is not None:
        operands.append(b.value(bias))
    kinds = [function or "", "bias" if bias is not None else ""]
    name = "_".join(["matmul", str(rows), str(inner), str(columns), *filter(None, kinds)])

    def make() -> Any:
        return matmul(rows, inner, columns, tile, has_bias=bias is not None, function=function)

    product = b.call(name, make, operands, (rows, columns))
    return b.reshape(product, node.shape)


def _packed(b: Builder, weight: Any, tile: Tile) -> Any:
    """Return the panels of a weight: computed here where it is a parameter, by the graph where it is not."""
    constant = b.constants.get(weight)
    if constant is None:
        rows, inner = (int(size) for size in weight.meta["val"].shape)
        name = f"pack_{rows}_{inner}_{tile.columns}"
        shape = (-(-rows // tile.columns), inner, tile.columns)
        return b.call(name, lambda: _pack_function(rows, inner, tile), [b.value(weight)], shape)
    return b.parameter(f"{weight.name} in panels of {tile.columns}", lambda: pack(constant.numpy(), tile.columns))


def pack(weight: np.ndarray, width: int) -> np.ndarray:
    """Return a weight ``[O, I]`` as panels ``[ceil(O / width), I, width]``, filled up with zeros."""
    rows, inner = weight.shape
    filled = np.zeros((-(-rows // width) * width, inner), weight.dtype)
    filled[:rows] = weight
    return np.ascontiguousarray(filled.reshape(-1, width, inner).transpose(0, 2, 1))


def matmul(rows: int, inner: int, columns: int, tile: Tile, *, has_bias: bool, function: str | None) -> Any:
    """Return the function ``function(x w + bias)`` of x ``[rows, inner]`` and w in panels.

    The last tile of rows reads the last row again where the rows do not divide, so that no tile is cut.
    """
    from tvm import s_tir, te, tirx

    panels, stripes = -(-columns // tile.columns), -(-rows // tile.rows)
    x = te.placeholder((rows, inner), "float32", name="x")
    w = te.placeholder((panels, inner, tile.columns), "float32", name="w")
    bias = te.placeholder((columns,), "float32", name="bias")
    k = te.reduce_axis((0, inner), name="k")

    def product(panel: Any, stripe: Any, i: Any, j: Any) -> Any:
        row = tirx.min(stripe * tile.rows + i, rows - 1) if rows % tile.rows else stripe * tile.rows + i
        return te.sum(x[row, k] * w[panel, k, j], axis=k)

    tiles = te.compute((panels, stripes, tile.rows, tile.columns), product, name="product")

    def epilogue(i: Any, j: Any) -> Any:
        value = tiles[j // tile.columns, i // tile.rows, i % tile.rows, j % tile.columns]
        value = value + bias[j] if has_bias else value
        return FUNCTIONS[function](value) if function else value

    y = te.compute((rows, columns), epilogue, name="epilogue")
    schedule = s_tir.Schedule(te.create_prim_func([x, w, *([bias] if has_bias else []), y]))
    _schedule_product(schedule, schedule.get_sblock("product"))
    _schedule_epilogue(schedule, schedule.get_sblock("epilogue"), tile)
    return schedule.mod["main"]


def _schedule_product(schedule: Any, block: Any) -> None:
    """Threads over tiles, panel by panel; in a tile the sum over k, of which each step is one row of the panel."""
    sums = schedule.cache_write(block, 0, "local")
    panel, stripe, i, j, k = schedule.get_loops(block)
    schedule.reorder(panel, stripe, k, i, j)
    fused = schedule.fuse(panel, stripe)
    schedule.parallel(fused)
    schedule.reverse_compute_at(sums, fused)
    schedule.vectorize(schedule.get_loops(sums)[-1])
    # in this order: what is left of the sum once its start is split off may not be vectorized any more
    schedule.unroll(i)
    schedule.vectorize(j)
    start = schedule.decompose_reduction(block, k)
    schedule.unroll(schedule.get_loops(start)[-2])
    schedule.vectorize(schedule.get_loops(start)[-1])


def _schedule_epilogue(schedule: Any, block: Any, tile: Tile) -> None:
    i, j = schedule.get_loops(block)
    _, inside = schedule.split(j, [None, tile.columns])
    schedule.parallel(i)
    schedule.vectorize(inside)


def _pack_function(rows: int, inner: int, tile: Tile) -> Any:
    """Return the function that packs a weight the graph computes."""
    from tvm import s_tir, te, tirx

    width = tile.columns
    weight = te.placeholder((rows, inner), "float32", name="weight")

    def entry(panel: Any, k: Any, j: Any) -> Any:
        row = panel * width + j
        kept = weight[tirx.min(row, rows - 1), k]
        return tirx.Select(row < rows, kept, tirx.const(0.0, "float32")) if rows % width else kept

    packed = te.compute((-(-rows // width), inner, width), entry, name="panels")
    schedule = s_tir.Schedule(te.create_prim_func([weight, packed]))
    schedule.parallel(schedule.get_loops(schedule.get_sblock("panels"))[0])
    return schedule.mod["main"]


KERNEL = Kernel(emit, accepts)
