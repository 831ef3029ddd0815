"""TVM kernel of ``xf.layer_norm``, with the residual sum of ``xf.add_layer_norm``: a row at a time, in its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import fill, flat, lane_sums, room, write_function

__all__ = ["KERNEL", "accepts", "emit", "layer_norm"]

# wider vectors than any register: several sums at once hide how long one addition takes
_WIDEST = 64


def accepts(arguments: Mapping[str, Any]) -> Verdict:
    """Take fp32."""
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return None if all(tensor.dtype == torch.float32 for tensor in tensors) else "it is not in fp32"


def emit(b: Builder, node: TvmNode) -> Any:
    """Emit the norm; of a sum where the node has a residual."""
    given = node.arguments
    groups, eps = int(given.get("groups", 1)), float(given["eps"])
    names = [name for name in ("x", "residual", "weight", "bias") if given.get(name) is not None]
    has = {f"has_{name}": name in names for name in ("residual", "weight", "bias")}
    sizes = [*node.shape, groups, f"{eps:.3g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})]
    name = "_".join(["add_layer_norm" if has["has_residual"] else "layer_norm", *map(str, sizes), *names[1:]])
    operands = [b.value(given[name]) for name in names]
    return b.call(name, lambda: layer_norm(node.shape, groups, eps, **has), operands, node.shape, *node.other_shapes)


def layer_norm(
    shape: tuple[int, ...], groups: int, eps: float, *, has_residual: bool, has_weight: bool, has_bias: bool
) -> Any:
    """Return the function of x ``[..., C]``, and the residual, weight and bias where it has them.

    With a residual it has two results: the norm of the sum, and the sum.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    width = shape[-1] // groups
    rows = int(np.prod(shape)) // width
    lanes = next(lanes for lanes in range(min(_WIDEST, width), 0, -1) if width % lanes == 0)

    def body(*buffers: Any) -> None:
        given = list(buffers)
        x = flat(given.pop(0), (rows, width))
        residual = flat(given.pop(0), (rows, width)) if has_residual else None
        weight = ir.buffer_proxy(given.pop(0)) if has_weight else None
        bias = ir.buffer_proxy(given.pop(0)) if has_bias else None
        y = flat(given.pop(0), (rows, width))
        kept = flat(given.pop(0), (rows, width)) if has_residual else x
        with ir.parallel(0, rows) as row:
            sums = room((2, lanes))
            fill(sums, 2, lanes, 0.0)
            with ir.serial(0, width // lanes) as part, ir.vectorized(0, lanes) as j:
                c = part * lanes + j
                if residual is not None:
                    kept[row, c] = x[row, c] + residual[row, c]
                sums[0, j] = sums[0, j] + kept[row, c]
            lane_sums(sums, 0, lanes, lambda a, b: a + b)
            sums[0, 0] = sums[0, 0] / ir.float32(width)
            with ir.serial(0, width // lanes) as part, ir.vectorized(0, lanes) as j:
                difference = kept[row, part * lanes + j] - sums[0, 0]
                sums[1, j] = sums[1, j] + difference * difference
            lane_sums(sums, 1, lanes, lambda a, b: a + b)
            sums[1, 0] = ir.float32(1.0) / tirx.sqrt(sums[1, 0] / ir.float32(width) + ir.float32(eps))
            with ir.serial(0, width // lanes) as part, ir.vectorized(0, lanes) as j:
                c = part * lanes + j
                value = (kept[row, c] - sums[0, 0]) * sums[1, 0]
                value = value if weight is None else value * weight[c]
                y[row, c] = value if bias is None else value + bias[c]

    operands = [
        *((name, shape, "float32") for name in ("x", *(["residual"] if has_residual else []))),
        *((name, (width,), "float32") for name, has in (("weight", has_weight), ("bias", has_bias)) if has),
        *((name, shape, "float32") for name in ("y", *(["sum"] if has_residual else []))),
    ]
    return write_function(operands, body)


KERNEL = Kernel(emit, accepts)
