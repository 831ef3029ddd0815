"""TVM kernel of ``xf.shift_linear``: no multiplication; a weight's exponent is added to that of the activation.

A float times a signed power of two has its exponent raised and its sign flipped, which one addition of integers does to
its bits: ``bits(x 2^e) = bits(x) + (e << 23)``, and ``+ (1 << 31)`` flips the sign.  Where x or w is 0 the term is
masked out.  Then the terms are added as floats: what a shift is to integers.

An activation below 2^-80 counts as 0, so that no exponent falls below the least; one above 2^100 has no place in a net.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.errors import LoweringError
from xformopt.kernels.linear.tvm import pack, tiles_of
from xformopt.kernels.packing import unpack
from xformopt.kernels.tvm_form import Builder, Kernel, Tile, TvmNode, Verdict
from xformopt.kernels.tvm_loops import flat, registers, starts, write_function

__all__ = ["KERNEL", "matmul", "words"]

_MANTISSA_BITS = 23
_LEAST = 2.0**-80
# the word of the weight 0, which no power of two has: one that would raise the exponent by 128
_NOTHING = 128 << _MANTISSA_BITS


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["x"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["x"].dim() > 1 else "x is one vector"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, x_shape, shape = node.arguments, node.shape_of("x"), node.shape
    bits, top = int(given["bits"]), int(given["top"])
    inner, columns, rows = x_shape[-1], shape[-1], int(np.prod(x_shape[:-1]))
    has_bias = given["bias"] is not None

    def make(tile: Tile) -> Any:
        return matmul(x_shape, shape, tile, has_bias=has_bias)

    name = "_".join(["shift_matmul", *map(str, (rows, inner, columns)), *(["bias"] if has_bias else [])])
    tile = b.tile(name, make, Tile.of(b.machine, rows, columns), tiles_of(b.machine, rows, columns))
    codes = b.constants.get(given["weight"])
    if codes is None:
        raise LoweringError(
            f"The weight {given['weight'].name} of a product by shifts is computed by the program, and TVM's kernel "
            f"packs parameters alone. Lower it for ort-cpu."
        )
    stored = codes
    panels = b.parameter(
        f"{given['weight'].name} in panels of {tile.columns}, {top}",
        lambda: pack(words(stored, bits, top, inner), tile.columns),
    )
    operands = [b.value(given["x"]), panels, *([b.value(given["bias"])] if has_bias else [])]
    return b.call(f"{name}_from{len(x_shape)}_to{len(shape)}", lambda: make(tile), operands, shape)


def words(weight: torch.Tensor, bits: int, top: int, inner: int) -> np.ndarray:
    """Return what is added to the bits of an activation for each weight, int32 ``[O, I]``.

    ``weight`` holds the packed codes: sign, and k for the exponent ``top - (last - k)``, 0 for the weight 0.
    """
    last = 2 ** (bits - 1) - 1
    codes = unpack(weight, bits, inner).long()
    power = codes & last
    word = (power + (top - last) << _MANTISSA_BITS) + ((codes >> (bits - 1)) << 31)
    found = torch.where(power == 0, torch.full_like(word, _NOTHING), word)
    array: np.ndarray = found.numpy().astype(np.int32)
    return array


def matmul(x_shape: tuple[int, ...], shape: tuple[int, ...], tile: Tile, *, has_bias: bool) -> Any:
    """Return the function of x ``[..., inner]`` and words in panels; threads and tiles are those of ``xf.linear``."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    inner, columns = x_shape[-1], shape[-1]
    rows = int(np.prod(shape[:-1]))
    panels, stripes = -(-columns // tile.columns), -(-rows // tile.rows)

    def integer(value: int) -> Any:
        return tirx.const(value, "int32")

    def body(*buffers: Any) -> None:
        x, w, y = flat(buffers[0], (rows, inner)), ir.buffer_proxy(buffers[1]), flat(buffers[-1], (rows, columns))
        bias = ir.buffer_proxy(buffers[2]) if has_bias else None
        with ir.parallel(0, panels * stripes) as task:
            panel = task // stripes
            row, column = starts(task % stripes, tile.rows, rows), starts(panel, tile.columns, columns)
            sums = registers(tile.rows, tile.columns)
            with ir.serial(0, inner) as k:
                for i, held in enumerate(sums):
                    value = x[row + i, k]
                    number = tirx.reinterpret("int32", value)
                    with ir.vectorized(0, tile.columns) as j:
                        word = w[panel, k, j]
                        term = tirx.reinterpret("float32", number + word)
                        counts = tirx.all(word != integer(_NOTHING), tirx.abs(value) > ir.float32(_LEAST))
                        held[j] = held[j] + tirx.Select(counts, term, ir.float32(0.0))
            for i in range(tile.rows):
                with ir.vectorized(0, tile.columns) as j:
                    y[row + i, column + j] = sums[i][j] if bias is None else sums[i][j] + bias[column + j]

    operands = [
        ("x", x_shape, "float32"),
        ("w", (panels, inner, tile.columns), "int32"),
        *([("bias", (columns,), "float32")] if has_bias else []),
        ("y", shape, "float32"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
