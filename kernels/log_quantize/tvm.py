"""TVM kernel of ``xf.log_quantize``: codes by a logarithm in fp32, and a table of what each stands for.

A code that lies within rounding of half a step may become its neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.log_quantize.reference import log_levels
from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import flat, starts, write_function
from xformopt.kernels.tvm_math import log2

__all__ = ["KERNEL", "quantize"]

_WIDEST = 16
_SMALLEST = 1e-30


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    return None if arguments["x"].dtype == torch.float32 else "it is not in fp32"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, shape = node.arguments, node.shape
    bits, numerator, denominator = (int(given[name]) for name in ("bits", "numerator", "denominator"))
    rounds, flush = bool(given["round_table"]), bool(given["flush"])
    levels = b.parameter(
        f"levels {bits} {numerator} {denominator} {rounds} {flush}",
        lambda: log_levels(bits, numerator, denominator, round_table=rounds, flush=flush).numpy().astype(np.float32),
    )
    name = "_".join(["log_quantize", *map(str, (*shape, bits, numerator, denominator))])
    operands = [b.value(given["x"]), b.value(given["scale"]), levels]
    return b.call(name, lambda: quantize(shape, bits, numerator, denominator), operands, shape)


def quantize(shape: tuple[int, ...], bits: int, numerator: int, denominator: int) -> Any:
    """Return the function of x, its scale, and what codes stand for at scale 1, the last below them all."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    total = int(np.prod(shape))
    lanes = min(_WIDEST, total)

    def body(x: Any, scale: Any, levels: Any, y: Any) -> None:
        x, scale, y = flat(x, (total,)), flat(scale, (1,)), flat(y, (total,))
        levels = ir.buffer_proxy(levels)
        with ir.parallel(0, -(-total // lanes)) as part, ir.vectorized(0, lanes) as j:
            value = x[starts(part, lanes, total) + j]
            clipped = tirx.max(tirx.min(value / scale[0], ir.float32(1.0)), ir.float32(_SMALLEST))
            code = tirx.nearbyint(log2(clipped) * ir.float32(-denominator / numerator))
            code = tirx.max(tirx.min(code, ir.float32(2**bits)), ir.float32(0.0)).astype("int32")
            found = levels[code] * scale[0]
            # what is no number has no code
            y[starts(part, lanes, total) + j] = tirx.Select(tirx.isnan(value), value, found)

    operands = [
        ("x", shape, "float32"),
        ("scale", (), "float32"),
        ("levels", (2**bits + 1,), "float32"),
        ("y", shape, "float32"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
