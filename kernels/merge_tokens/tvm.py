"""TVM kernel of ``xf.merge_tokens``: every token that stays gathers those that join it."""

from __future__ import annotations

from typing import Any

import numpy as np

from xformopt.kernels.layer_norm.tvm import accepts as is_fp32
from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import room, write_function

__all__ = ["KERNEL", "merge"]

_LANES = 16
_TINY = float(np.finfo(np.float32).tiny)


def _accepts(arguments: Any) -> Verdict:
    return is_fp32({name: arguments[name] for name in ("x", "sizes")})


def _emit(b: Builder, node: TvmNode) -> Any:
    given, shape, joined = node.arguments, node.shape_of("x"), node.shape_of("sources")[1]
    has_sizes = given["sizes"] is not None
    names = ["x", "kept", "sources", "destinations", *(["sizes"] if has_sizes else [])]
    name = "_".join(["merge_tokens", *map(str, (*shape, joined)), *names[4:]])
    shapes = (node.shape, *node.other_shapes)
    return b.call(name, lambda: merge(shape, joined, has_sizes), [b.value(given[each]) for each in names], *shapes)


def merge(shape: tuple[int, ...], joined: int, has_sizes: bool) -> Any:
    """Return the function of x ``[B, T, C]``, ``kept``, ``sources``, ``destinations``, and sizes where it has them."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    B, T, C = shape
    N, lanes = T - joined, min(_LANES, C)

    def body(*buffers: Any) -> None:
        x, kept, sources, destinations = (ir.buffer_proxy(buffer) for buffer in buffers[:4])
        sizes = ir.buffer_proxy(buffers[4]) if has_sizes else None
        merged, total = (ir.buffer_proxy(buffer) for buffer in buffers[-2:])

        def size(b: Any, t: Any) -> Any:
            return ir.float32(1.0) if sizes is None else sizes[b, t]

        with ir.parallel(0, B * N) as task:
            b, n = task // N, task % N
            held, weight = room((C,)), room((1,))

            def over_channels(write: Any) -> None:
                with ir.serial(0, C // lanes) as part, ir.vectorized(0, lanes) as j:
                    write(part * lanes + j)
                if C % lanes:
                    with ir.serial(0, C % lanes) as j:
                        write(C - C % lanes + j)

            def keep(t: Any) -> Any:
                def write(c: Any) -> None:
                    held[c] = x[b, t, c] * size(b, t)

                return write

            def join(t: Any) -> Any:
                def write(c: Any) -> None:
                    held[c] = held[c] + x[b, t, c] * size(b, t)

                return write

            def give(c: Any) -> None:
                merged[b, n, c] = held[c] / tirx.max(weight[0], ir.float32(_TINY))

            own = kept[b, n].astype("int32")
            weight[0] = size(b, own)
            over_channels(keep(own))
            with ir.serial(0, joined) as r, ir.If(destinations[b, r] == n.astype("int64")), ir.Then():
                guest = sources[b, r].astype("int32")
                weight[0] = weight[0] + size(b, guest)
                over_channels(join(guest))
            over_channels(give)
            total[b, n] = weight[0]

    operands = [
        ("x", shape, "float32"),
        ("kept", (B, N), "int64"),
        ("sources", (B, joined), "int64"),
        ("destinations", (B, joined), "int64"),
        *([("sizes", (B, T), "float32")] if has_sizes else []),
        ("merged", (B, N, C), "float32"),
        ("total", (B, N), "float32"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
