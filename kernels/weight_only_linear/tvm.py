"""TVM kernel of ``xf.weight_only_linear``: codes become floats in registers, a row of a panel at a time.

``(code - zero) * scale = code * scale + shift`` takes one conversion and one multiply-add for all rows of a tile.
Codes of up to 4 bits lie two to a byte, others one: what is read is an eighth or a quarter of what floats take.
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
from xformopt.kernels.tvm_loops import add_tile, flat, registers, room, starts, write_function

__all__ = ["KERNEL", "code_panels", "matmul", "shifts"]

_HALF_BYTE = 4


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["x"].dtype != torch.float32 or arguments["scale"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["x"].dim() > 1 else "x is one vector"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, x_shape, shape = node.arguments, node.shape_of("x"), node.shape
    inner, columns, rows = x_shape[-1], shape[-1], int(np.prod(x_shape[:-1]))
    bits, groups = int(given["bits"]), node.shape_of("weight")[1]
    has_bias = given["bias"] is not None
    stored = {name: b.constants.get(given[name]) for name in ("weight", "scale", "zero") if given[name] is not None}
    if any(value is None for value in stored.values()):
        raise LoweringError(
            f"The weight {given['weight'].name}, stored in few bits, is computed by the program, and TVM's kernel "
            f"packs parameters alone. Lower it for ort-cpu."
        )
    weight, scale, zero = stored["weight"], stored["scale"], stored.get("zero")
    assert weight is not None
    assert scale is not None
    per_byte = 2 if bits <= _HALF_BYTE and inner // groups % 2 == 0 else 1

    def make(tile: Tile) -> Any:
        return matmul(x_shape, shape, tile, groups, per_byte, has_bias=has_bias)

    kinds = [per_byte, groups, *(["bias"] if has_bias else [])]
    name = "_".join(["matmul_codes", *map(str, (rows, inner, columns, *kinds))])
    tile = b.tile(name, make, Tile.of(b.machine, rows, columns), tiles_of(b.machine, rows, columns))
    key = f"{given['weight'].name} in panels of {tile.columns}"
    codes = unpack(weight, bits, inner // groups).flatten(1).numpy()
    operands = [
        b.value(given["x"]),
        b.parameter(f"codes {key}", lambda: code_panels(codes, tile.columns, per_byte)),
        b.parameter(f"scales {key}", lambda: pack(scale.numpy(), tile.columns)),
        b.parameter(f"shifts {key}", lambda: pack(shifts(scale, zero, bits), tile.columns)),
        *([b.value(given["bias"])] if has_bias else []),
    ]
    return b.call(f"{name}_from{len(x_shape)}_to{len(shape)}", lambda: make(tile), operands, shape)


def shifts(scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> np.ndarray:
    """Return ``-zero * scale`` of every row and group, float32 ``[O, G]``."""
    middle = torch.full_like(scale, 2 ** (bits - 1))
    codes = middle if zero is None else unpack(zero, bits, scale.shape[1]).to(scale.dtype)
    found: np.ndarray = (-codes * scale).numpy()
    return found


def code_panels(codes: np.ndarray, width: int, per_byte: int) -> np.ndarray:
    """Return codes ``[O, I]`` as panels ``[ceil(O / width), I / per_byte, width]``, the lower half of a byte first."""
    panels = pack(codes, width)
    return panels if per_byte == 1 else panels[:, ::2] | panels[:, 1::2] << _HALF_BYTE


def matmul(
    x_shape: tuple[int, ...], shape: tuple[int, ...], tile: Tile, groups: int, per_byte: int, *, has_bias: bool
) -> Any:
    """Return the function of x ``[..., I]``, codes, scales and shifts in panels; its threads are those of a linear."""
    from tvm.script.ir_builder import tirx as ir

    inner, columns = x_shape[-1], shape[-1]
    rows, size = int(np.prod(shape[:-1])), inner // groups
    panels, stripes = -(-columns // tile.columns), -(-rows // tile.rows)

    def body(*buffers: Any) -> None:
        x, y = flat(buffers[0], (rows, inner)), flat(buffers[-1], (rows, columns))
        codes, scales, offsets = (ir.buffer_proxy(buffer) for buffer in buffers[1:4])
        bias = ir.buffer_proxy(buffers[4]) if has_bias else None
        with ir.parallel(0, panels * stripes) as task:
            panel = task // stripes
            row, column = starts(task % stripes, tile.rows, rows), starts(panel, tile.columns, columns)
            sums, weights = registers(tile.rows, tile.columns), room((tile.columns,))
            with ir.serial(0, groups) as group, ir.serial(0, size // per_byte) as step:
                for part in range(per_byte):
                    k = group * size + step * per_byte + part
                    with ir.vectorized(0, tile.columns) as j:
                        code = codes[panel, group * (size // per_byte) + step, j].astype("int32")
                        if per_byte > 1:
                            code = code >> _HALF_BYTE * part & (1 << _HALF_BYTE) - 1
                        weights[j] = code.astype("float32") * scales[panel, group, j] + offsets[panel, group, j]

                    def factor(i: int, k: Any = k) -> Any:
                        return x[row + i, k]

                    add_tile(sums, tile.columns, factor, lambda j: weights[j])
            for i in range(tile.rows):
                with ir.vectorized(0, tile.columns) as j:
                    y[row + i, column + j] = sums[i][j] if bias is None else sums[i][j] + bias[column + j]

    operands = [
        ("x", x_shape, "float32"),
        ("w", (panels, inner // per_byte, tile.columns), "uint8"),
        ("w_scales", (panels, groups, tile.columns), "float32"),
        ("w_shifts", (panels, groups, tile.columns), "float32"),
        *([("bias", (columns,), "float32")] if has_bias else []),
        ("y", shape, "float32"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
