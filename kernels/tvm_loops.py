"""Functions for TVM written as the loops they run: threads outside, registers inside, no block to schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["add_tile", "fill", "flat", "lane_sums", "registers", "room", "starts", "write_function"]

# an operand: name, shape, dtype
Operand = tuple[str, Sequence[int], str]


def write_function(operands: Sequence[Operand], body: Callable[..., None]) -> Any:
    """Return the function of ``operands``, results last, whose loops ``body`` opens when called with their buffers."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as ir

    with IRBuilder() as builder, ir.prim_func():
        ir.func_name("main")
        buffers = [ir.arg(name, ir.buffer(tuple(shape), dtype)) for name, shape, dtype in operands]
        # TVM looks into functions of one operand for a reshape in disguise, and takes for granted that they are a block
        with ir.sblock("root"):
            body(*buffers)
    return builder.get()


def flat(buffer: Any, shape: Sequence[int]) -> Any:
    """Return ``buffer`` to be read and written under another shape; nothing is moved."""
    from tvm.script.ir_builder import tirx as ir

    return ir.buffer_proxy(ir.decl_buffer(tuple(shape), buffer.dtype, data=buffer.data))


def room(shape: Sequence[int], dtype: str = "float32") -> Any:
    """Return memory of the thread's own."""
    from tvm.script.ir_builder import tirx as ir

    return ir.buffer_proxy(ir.alloc_buffer(tuple(shape), dtype, scope="global"))


def registers(rows: int, columns: int, dtype: str = "float32") -> list[Any]:
    """Return a tile of zeros, row by row.

    Each row is an array of its own, of the scope "global": LLVM keeps small arrays in registers, and TVM puts those
    over 1 KiB, and all of the scope "local", on the heap, where every step of a sum would be stored.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    tile = [ir.buffer_proxy(ir.alloc_buffer((columns,), dtype, scope="global")) for _ in range(rows)]
    for row in tile:
        with ir.vectorized(0, columns) as j:
            row[j] = tirx.const(0, dtype)
    return tile


def starts(step: int, size: int, total: int) -> Any:
    """Return where the ``step``-th part of ``size`` of ``total`` begins; the last one overlaps its neighbour.

    What lies in both is computed twice and written twice, with the same value: so no part is cut.
    """
    from tvm import tirx

    return tirx.min(step * size, total - size) if total % size else step * size


def fill(tile: Any, rows: int, columns: int, value: float) -> None:
    """Set every number of an array in memory."""
    from tvm.script.ir_builder import tirx as ir

    with ir.unroll(0, rows) as i, ir.vectorized(0, columns) as j:
        tile[i, j] = ir.float32(value)


def add_tile(tile: Sequence[Any], columns: int, left: Callable[[int], Any], right: Callable[[Any], Any]) -> None:
    """Add one step of a product: ``tile[i][j] += left(i) * right(j)``."""
    from tvm.script.ir_builder import tirx as ir

    for i, row in enumerate(tile):
        with ir.vectorized(0, columns) as j:
            row[j] = row[j] + left(i) * right(j)


def lane_sums(lanes: Any, row: Any, width: int, join: Callable[[Any, Any], Any]) -> Any:
    """Join ``lanes[row, :width]`` by halves into ``lanes[row, 0]``, and return that."""
    from tvm.script.ir_builder import tirx as ir

    while width > 1:
        half = (width + 1) // 2
        with ir.vectorized(0, width - half) as j:
            lanes[row, j] = join(lanes[row, j], lanes[row, j + half])
        width = half
    return lanes[row, 0]
