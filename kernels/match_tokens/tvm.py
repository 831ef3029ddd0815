"""TVM kernel of ``xf.match_tokens``: cosines row by row, and each token's place counted instead of sorted for.

A token's place in the falling order of similarities, equal ones in their own order, is the number of tokens before it.
So many are compared that a sort would not be faster, and threads share the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xformopt.kernels.match_tokens.reference import FORBIDDEN, FREE
from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import fill, lane_sums, room, write_function

__all__ = ["KERNEL", "match"]

_WIDEST = 16
_TINY = float(np.finfo(np.float32).tiny)


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return None if all(tensor.dtype == torch.float32 for tensor in tensors) else "it is not in fp32"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, shape = node.arguments, node.shape_of("keys")
    heads, prefix, r = int(given["heads"]), int(given["prefix"]), int(given["r"])
    has_sizes = given["sizes"] is not None
    name = "_".join(["match_tokens", *map(str, (*shape, heads, prefix, r)), *(["sizes"] if has_sizes else [])])
    operands = [b.value(given["keys"]), *([b.value(given["sizes"])] if has_sizes else [])]
    shapes = (node.shape, *node.other_shapes)
    return b.call(name, lambda: match(shape, heads, prefix, r, has_sizes), operands, *shapes, dtype="int64")


def match(shape: tuple[int, ...], heads: int, prefix: int, r: int, has_sizes: bool) -> Any:
    """Return the function of keys ``[B, T, heads * D]``, and the sizes where it has them."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    B, T, width = shape
    D = width // heads
    odd = (T - prefix) // 2
    even = T - prefix - odd
    lanes = next(lanes for lanes in range(min(_WIDEST, D), 0, -1) if D % lanes == 0)

    def dot(left: Any, right: Any) -> Any:
        """Return the sum of products of D numbers, read by functions of their place."""
        sums = room((1, lanes))
        fill(sums, 1, lanes, 0.0)
        with ir.serial(0, D // lanes) as part, ir.vectorized(0, lanes) as j:
            sums[0, j] = sums[0, j] + left(part * lanes + j) * right(part * lanes + j)
        return lane_sums(sums, 0, lanes, lambda a, b: a + b)

    def place(value: Any) -> Any:
        return value.astype("int64")

    def body(*buffers: Any) -> None:
        given = [ir.buffer_proxy(buffer) for buffer in buffers]
        keys, sizes, (kept, sources, destinations) = given[0], given[1] if has_sizes else None, given[-3:]
        metric, best = room((B, T, D)), room((B, even))
        partner = room((B, even), "int32")
        with ir.parallel(0, B * T) as task:
            b, t = task // T, task % T
            with ir.serial(0, D // lanes) as part, ir.vectorized(0, lanes) as j:
                metric[b, t, part * lanes + j] = ir.float32(0.0)
            with ir.serial(0, heads) as head, ir.serial(0, D // lanes) as part, ir.vectorized(0, lanes) as j:
                c = part * lanes + j
                metric[b, t, c] = metric[b, t, c] + keys[b, t, head * D + c]
            norm = room((1,))
            norm[0] = tirx.sqrt(dot(lambda c: metric[b, t, c], lambda c: metric[b, t, c])) / ir.float32(heads)
            norm[0] = ir.float32(1.0 / heads) / tirx.max(norm[0], ir.float32(_TINY))
            with ir.serial(0, D // lanes) as part, ir.vectorized(0, lanes) as j:
                c = part * lanes + j
                metric[b, t, c] = metric[b, t, c] * norm[0]
        with ir.parallel(0, B * even) as task:
            b, a = task // even, task % even
            mine = prefix + 2 * a
            best[b, a] = ir.float32(-3.0)
            partner[b, a] = ir.int32(0)
            with ir.serial(0, odd) as o:
                theirs = prefix + 1 + 2 * o
                found = room((1,))
                found[0] = dot(lambda c: metric[b, mine, c], lambda c: metric[b, theirs, c])
                if sizes is not None:
                    found[0] = tirx.if_then_else(sizes[b, theirs] == ir.float32(0), ir.float32(FORBIDDEN), found[0])
                    found[0] = tirx.if_then_else(sizes[b, mine] == ir.float32(0), ir.float32(FREE), found[0])
                with ir.If(found[0] > best[b, a]), ir.Then():
                    best[b, a] = found[0]
                    partner[b, a] = o
        with ir.parallel(0, B * even) as task:
            b, a = task // even, task % even
            before = room((1,), "int32")
            before[0] = ir.int32(0)
            with ir.serial(0, even) as other:
                is_tied = tirx.And(best[b, other] == best[b, a], other < a)
                first = tirx.Or(best[b, other] > best[b, a], is_tied)
                before[0] = before[0] + first.astype("int32")
            with ir.If(before[0] < r):
                with ir.Then():
                    sources[b, before[0]] = place(prefix + 2 * a)
                    destinations[b, before[0]] = place(prefix + even - r + partner[b, a])
                with ir.Else():
                    kept[b, prefix + before[0] - r] = place(prefix + 2 * a)
        with ir.parallel(0, B) as b:
            if prefix:
                with ir.serial(0, prefix) as t:
                    kept[b, t] = place(t)
            with ir.serial(0, odd) as o:
                kept[b, prefix + even - r + o] = place(prefix + 1 + 2 * o)

    operands = [
        ("keys", shape, "float32"),
        *([("sizes", (B, T), "float32")] if has_sizes else []),
        ("kept", (B, T - r), "int64"),
        ("sources", (B, r), "int64"),
        ("destinations", (B, r), "int64"),
    ]
    return write_function(operands, body)


KERNEL = Kernel(_emit, _accepts)
