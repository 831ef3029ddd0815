"""TVM kernel of ``xf.quantized_linear``: codes of the activations, integer products in registers, scales and bias.

Three functions: the range of the activations, where none was calibrated; their codes, which layers on one value share;
and the product, whose epilogue undoes zero point and scales.  Codes are rounded after a product with ``1 / scale``, so
one in a million may fall to the other side of a tie than the definition's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.errors import LoweringError
from xformopt.kernels.linear.tvm import tiles_of
from xformopt.kernels.tvm_form import Builder, Kernel, Machine, Tile, TvmNode, Verdict
from xformopt.kernels.tvm_integers import Dot, dot_of
from xformopt.kernels.tvm_loops import fill, flat, lane_sums, registers, room, starts, write_function

__all__ = ["KERNEL", "codes", "dynamic_span", "matmul", "pack"]

# the range is taken of so many parts at once, in vectors of at most so many numbers
_PARTS, _LANES = 16, 64
_LARGEST_CODE = 255.0


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["x"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["x"].dim() > 1 else "x is one vector"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, dot, lanes = node.arguments, dot_of(b.machine), b.machine.lanes
    x_shape, shape = node.shape_of("x"), node.shape
    inner, columns, rows = x_shape[-1], shape[-1], int(np.prod(x_shape[:-1]))
    codes_shape = rows, _padded(inner, dot)
    span = _span(b, node)
    taken = b.once(
        f"codes of {_what(node)}",
        lambda: b.call(
            "_".join(["codes", dot.name, *map(str, x_shape)]),
            lambda: codes(x_shape, dot),
            [b.value(given["x"]), span],
            codes_shape,
            dtype=dot.codes,
        ),
    )
    has_bias = given["bias"] is not None

    def make(tile: Tile) -> Any:
        return matmul(codes_shape, shape, tile, dot, lanes, has_bias=has_bias)

    name = "_".join(["matmul8", *map(str, (rows, inner, columns)), dot.name, *(["bias"] if has_bias else [])])
    others = [_whole(tile, lanes) for tile in tiles_of(b.machine, rows, columns)]
    tile = b.tile(name, make, _default_tile(b.machine, rows, columns), list(dict.fromkeys(others)))
    weight = _constant(b, given["weight"])
    key = f"{given['weight'].name} in panels of {tile.columns}"
    operands = [
        taken,
        b.parameter(key, lambda: pack(weight, tile.columns, dot)),
        b.parameter(f"sums of {given['weight'].name}", lambda: weight.sum(1, dtype=np.int32)),
        span,
        b.value(given["scale"]),
        *([b.value(given["bias"])] if has_bias else []),
    ]
    return b.call(f"{name}_to{len(shape)}", lambda: make(tile), operands, shape)


def _span(b: Builder, node: TvmNode) -> Any:
    """Return what a step is worth and the code of zero, two floats: those calibrated, or of the value itself."""
    from tvm import relax

    scale, zero, x_shape = node.arguments["x_scale"], node.arguments["x_zero"], node.shape_of("x")
    key = f"span of {_what(node)}"
    if scale is None:
        name = "_".join(["span", *map(str, x_shape)])
        operands = [b.value(node.arguments["x"])]
        return b.once(key, lambda: b.call(name, lambda: dynamic_span(x_shape), operands, (2,)))
    if scale in b.constants and zero in b.constants:
        return b.parameter(key, lambda: np.array([float(b.constants[each]) for each in (scale, zero)], np.float32))
    parts = [relax.op.reshape(relax.op.astype(b.value(each), "float32"), (1,)) for each in (scale, zero)]
    return b.once(key, lambda: b.block_builder.emit(relax.op.concat(parts)))


def _what(node: TvmNode) -> str:
    scale = node.arguments["x_scale"]
    return f"{node.arguments['x'].name} by {'itself' if scale is None else scale.name}"


def _constant(b: Builder, weight: Any) -> np.ndarray:
    if weight not in b.constants:
        raise LoweringError(
            f"The weight {weight.name} of an integer product is computed by the program, and TVM's kernel packs "
            f"parameters alone. Lower it for ort-cpu."
        )
    array: np.ndarray = b.constants[weight].detach().numpy()
    return array


def _padded(inner: int, dot: Dot) -> int:
    return -(-inner // dot.group) * dot.group


def _whole(tile: Tile, lanes: int) -> Tile:
    """Return a tile of whole vectors; a product narrower than one is computed as wide."""
    return Tile(tile.rows, max(tile.columns // lanes, 1) * lanes)


def _default_tile(machine: Machine, rows: int, columns: int) -> Tile:
    return _whole(Tile.of(machine, rows, columns), machine.lanes)


def pack(weight: np.ndarray, width: int, dot: Dot) -> np.ndarray:
    """Return a weight ``[O, I]`` as panels ``[ceil(O / width), ceil(I / group), width * group]``.

    A step's products of one column lie together.  The last panel begins where it fits; columns beyond ``O`` are 0.
    """
    rows, inner = weight.shape
    whole = np.zeros((max(rows, width), _padded(inner, dot)), np.int8)
    whole[:rows, :inner] = weight
    first = [min(start, len(whole) - width) for start in range(0, rows, width)]
    panels = [whole[start : start + width].reshape(width, -1, dot.group).transpose(1, 0, 2) for start in first]
    return np.stack(panels).reshape(len(first), -1, width * dot.group)


def dynamic_span(shape: tuple[int, ...]) -> Any:
    """Return the function of x that gives scale and zero point of its range, widened to hold zero."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    total = int(np.prod(shape))
    lanes = min(_LANES, total)
    # whole vectors, and never more than there are: the last part overlaps its neighbour
    size = min(-(-total // (_PARTS * lanes)) * lanes, total // lanes * lanes)
    parts = -(-total // size)

    def body(x: Any, span: Any) -> None:
        x, span = flat(x, (total,)), ir.buffer_proxy(span)
        ends = room((2 * parts, lanes))
        with ir.parallel(0, parts) as part:
            start = tirx.min(part * size, total - size)
            held = room((2, lanes))
            fill(held, 2, lanes, 0.0)
            with ir.serial(0, size // lanes) as step, ir.vectorized(0, lanes) as j:
                held[0, j] = tirx.min(held[0, j], x[start + step * lanes + j])
                held[1, j] = tirx.max(held[1, j], x[start + step * lanes + j])
            with ir.vectorized(0, lanes) as j:
                ends[part, j] = held[0, j]
            with ir.vectorized(0, lanes) as j:
                ends[parts + part, j] = held[1, j]
        with ir.serial(1, parts) as part:
            with ir.vectorized(0, lanes) as j:
                ends[0, j] = tirx.min(ends[0, j], ends[part, j])
            with ir.vectorized(0, lanes) as j:
                ends[parts, j] = tirx.max(ends[parts, j], ends[parts + part, j])
        low = lane_sums(ends, 0, lanes, tirx.min)
        high = lane_sums(ends, parts, lanes, tirx.max)
        width = (high - low) / ir.float32(_LARGEST_CODE)
        span[0] = tirx.Select(high > low, width, ir.float32(1.0))
        span[1] = tirx.max(tirx.min(tirx.nearbyint(-low / span[0]), ir.float32(_LARGEST_CODE)), ir.float32(0.0))

    return write_function([("x", shape, "float32"), ("span", (2,), "float32")], body)


def codes(shape: tuple[int, ...], dot: Dot) -> Any:
    """Return the function of x ``[..., I]`` and its span that gives the codes, each row padded to whole steps."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    inner = shape[-1]
    rows, padded = int(np.prod(shape[:-1])), _padded(inner, dot)
    lanes = min(_LANES, inner)

    def body(x: Any, span: Any, codes: Any) -> None:
        x, span, codes = flat(x, (rows, inner)), ir.buffer_proxy(span), ir.buffer_proxy(codes)
        with ir.parallel(0, rows) as row:
            factor = room((2,))
            factor[0] = ir.float32(1.0) / span[0]
            factor[1] = span[1]
            if padded > inner:
                with ir.serial(0, padded - inner) as j:
                    codes[row, inner + j] = tirx.const(0, dot.codes)
            with ir.serial(0, -(-inner // lanes)) as part, ir.vectorized(0, lanes) as j:
                column = starts(part, lanes, inner) + j
                value = tirx.nearbyint(x[row, column] * factor[0]) + factor[1]
                value = tirx.max(tirx.min(value, ir.float32(_LARGEST_CODE)), ir.float32(0.0))
                codes[row, column] = (value.astype("int32") - tirx.const(dot.shift, "int32")).astype(dot.codes)

    operands = [("x", shape, "float32"), ("span", (2,), "float32"), ("codes", (rows, padded), dot.codes)]
    return write_function(operands, body)


def matmul(
    codes_shape: tuple[int, int], shape: tuple[int, ...], tile: Tile, dot: Dot, lanes: int, *, has_bias: bool
) -> Any:
    """Return the function ``((codes - zero) w) * (step * scale) + bias`` of codes ``[rows, I]`` and w in panels.

    The sums of a tile stay in registers over all steps; the zero point comes off at the end, by sums of the weights.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    (rows, inner), columns = codes_shape, shape[-1]
    panels, stripes = -(-columns // tile.columns), -(-rows // tile.rows)
    # columns of a panel that the product has
    written = min(tile.columns, columns)

    def body(*buffers: Any) -> None:
        x, w, weight_sums, span, scale = (ir.buffer_proxy(buffer) for buffer in buffers[:5])
        bias = ir.buffer_proxy(buffers[5]) if has_bias else None
        y = flat(buffers[-1], (rows, columns))
        with ir.parallel(0, panels * stripes) as task:
            row, panel = starts(task % stripes, tile.rows, rows), task // stripes
            column = starts(panel, tile.columns, columns) if columns > written else 0
            sums = registers(tile.rows, tile.columns, "int32")
            with ir.serial(0, inner // dot.group) as k:
                for i, held in enumerate(sums):
                    code = x[row + i, _ramp(k * dot.group, dot.group)]
                    for start in range(0, tile.columns, lanes):
                        weights = w[panel, k, _ramp(start * dot.group, lanes * dot.group)]
                        place = _ramp(start, lanes)
                        held[place] = dot.add(held[place], code, weights, lanes)
            factor, zero = room((1,)), room((1,), "int32")
            factor[0] = span[0]
            zero[0] = span[1].astype("int32") - tirx.const(dot.shift, "int32")
            for i in range(tile.rows):
                with ir.vectorized(0, written) as j:
                    total = (sums[i][j] - zero[0] * weight_sums[column + j]).astype("float32")
                    value = total * (factor[0] * scale[column + j])
                    y[row + i, column + j] = value if bias is None else value + bias[column + j]

    operands = [
        ("codes", codes_shape, dot.codes),
        ("w", (panels, inner // dot.group, tile.columns * dot.group), "int8"),
        ("sums", (columns,), "int32"),
        ("span", (2,), "float32"),
        ("scale", (columns,), "float32"),
        *([("bias", (columns,), "float32")] if has_bias else []),
        ("y", shape, "float32"),
    ]
    return write_function(operands, body)


def _ramp(start: Any, size: int) -> Any:
    from tvm import tirx

    return tirx.Ramp(start, 1, size) if size > 1 else start


KERNEL = Kernel(_emit, _accepts)
