"""TVM kernel of ``xf.attention``: a thread takes a few queries of one head through all steps, in its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.kernels.tvm_form import Builder, Kernel, Tile, TvmNode, Verdict
from xformopt.kernels.tvm_loops import add_tile, fill, lane_sums, registers, room, starts, write_function
from xformopt.kernels.tvm_math import exp

__all__ = ["KERNEL", "Sizes", "attention"]

# what a hidden key's logit is: its weight is 0 beside any other, and a row of nothing but these stays finite
_HIDDEN = -1e30


@dataclass(frozen=True)
class Sizes:
    """What one function is written for: sizes in the letters of ``xf.attention``, and what hides keys."""

    B: int
    T: int
    S: int
    heads: int
    kv_heads: int
    D: int
    E: int
    scale: float
    has_mask: bool
    causal: bool
    window_left: int
    window_right: int
    has_log_size: bool = False

    @property
    def name(self) -> str:
        """A name for the function, the same for equal sizes only."""
        sizes = [self.B, self.T, self.S, self.heads, self.kv_heads, self.D, self.E]
        hiding = [int(self.has_mask), int(self.causal), self.window_left + 1, self.window_right + 1]
        scale = f"{self.scale:.9g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})
        return "_".join(["attention", *map(str, [*sizes, *hiding]), scale, *(["sizes"] if self.has_log_size else [])])


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["q"].dtype != torch.float32:
        return "it is not in fp32"
    if arguments["bias"] is not None:
        return "its logits have a bias"
    return None


def _emit(b: Builder, node: TvmNode) -> Any:
    given = node.arguments
    (B, T, width), (_, S, _) = node.shape_of("q"), node.shape_of("k")
    heads, kv_heads = int(given["heads"]), int(given["kv_heads"])
    sizes = Sizes(
        B,
        T,
        S,
        heads,
        kv_heads,
        D=width // heads,
        E=node.shape_of("v")[2] // kv_heads,
        scale=float(given["scale"]),
        has_mask=given["key_mask"] is not None,
        causal=bool(given["causal"]),
        window_left=int(given["window_left"]),
        window_right=int(given["window_right"]),
        has_log_size=given["key_log_size"] is not None,
    )
    names = [
        "q",
        "k",
        "v",
        *(["key_mask"] if sizes.has_mask else []),
        *(["key_log_size"] if sizes.has_log_size else []),
    ]
    width = 2 * b.machine.lanes
    heights = range(min(4, T), min(T, (b.machine.registers - 4) // 2) + 1)
    tile = b.tile(
        sizes.name,
        lambda tile: attention(sizes, tile),
        Tile(Tile.of(b.machine, T, S).rows, width),
        [Tile(height, width) for height in sorted(heights, key=lambda height: -(-T // height) * height)],
    )
    return b.call(sizes.name, lambda: attention(sizes, tile), [b.value(given[name]) for name in names], node.shape)


def attention(sizes: Sizes, tile: Tile) -> Any:
    """Return the function of q ``[B, T, heads D]``, k ``[B, S, kv_heads D]``, v ``[B, S, kv_heads E]``, and the others.

    Keys are laid out anew, ``[B kv_heads, panels, D, columns]``, so that logits are computed along the keys.  Then
    each task takes ``tile.rows`` queries of one head from logits to outputs; its logits, ``[rows, S]``, stay in the
    cache.  A query that sees no key gets zeros.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    B, S, H, D, E = sizes.B, sizes.S, sizes.heads, sizes.D, sizes.E
    panels, stripes = -(-S // tile.columns), -(-sizes.T // tile.rows)

    def body(*buffers: Any) -> None:
        q, k, v = (ir.buffer_proxy(buffer) for buffer in buffers[:3])
        mask, y = ir.buffer_proxy(buffers[3]) if sizes.has_mask else None, ir.buffer_proxy(buffers[-1])
        log_size = ir.buffer_proxy(buffers[-2]) if sizes.has_log_size else None
        keys = room((B * sizes.kv_heads, panels, D, tile.columns))
        with ir.parallel(0, B * sizes.kv_heads * panels) as part:
            head, panel = part // panels, part % panels
            with ir.serial(0, D) as d, ir.vectorized(0, tile.columns) as j:
                s = tirx.min(panel * tile.columns + j, S - 1)
                keys[head, panel, d, j] = k[head // sizes.kv_heads, s, head % sizes.kv_heads * D + d]
        with ir.parallel(0, B * H * stripes) as task:
            batch, head = task // (H * stripes), task // stripes % H
            shared = head // (H // sizes.kv_heads)
            row = starts(task % stripes, tile.rows, sizes.T)
            weights = room((tile.rows, panels * tile.columns))
            peaks = room((tile.rows, tile.columns))
            fill(peaks, tile.rows, tile.columns, 2 * _HIDDEN)
            with ir.serial(0, panels) as panel:
                sums = registers(tile.rows, tile.columns)
                with ir.serial(0, D) as d:
                    add_tile(
                        sums,
                        tile.columns,
                        lambda i: q[batch, row + i, head * D + d],
                        lambda j: keys[batch * sizes.kv_heads + shared, panel, d, j],
                    )
                for i in range(tile.rows):
                    with ir.vectorized(0, tile.columns) as j:
                        s = panel * tile.columns + j
                        kept = None if mask is None else mask[batch, tirx.min(s, S - 1)]
                        logit = sums[i][j] * ir.float32(sizes.scale)
                        if log_size is not None:
                            logit = logit + log_size[batch, tirx.min(s, S - 1)]
                        for visible in _conditions(sizes, kept, row + i, s, tile.columns):
                            logit = tirx.Select(visible, logit, ir.float32(_HIDDEN))
                        weights[i, s] = logit
                        peaks[i, j] = tirx.max(peaks[i, j], logit)
            totals = room((tile.rows, tile.columns))
            fill(totals, tile.rows, tile.columns, 0.0)
            with ir.serial(0, tile.rows) as i:
                peak = lane_sums(peaks, i, tile.columns, tirx.max)
                with ir.serial(0, panels) as panel, ir.vectorized(0, tile.columns) as j:
                    s = panel * tile.columns + j
                    # where every key is hidden the difference is 0, and the weight must not be 1
                    weight = exp(weights[i, s] - peak)
                    weights[i, s] = tirx.Select(weights[i, s] > ir.float32(_HIDDEN), weight, ir.float32(0.0))
                    totals[i, j] = totals[i, j] + weights[i, s]
                lane_sums(totals, i, tile.columns, lambda a, b: a + b)
                totals[i, 0] = ir.float32(1.0) / tirx.max(totals[i, 0], ir.float32(1e-30))
            width = min(tile.columns, E)
            with ir.serial(0, -(-E // width)) as part:
                column = starts(part, width, E)
                means = registers(tile.rows, width)
                with ir.serial(0, S) as s:
                    add_tile(means, width, lambda i: weights[i, s], lambda j: v[batch, s, shared * E + column + j])
                for i in range(tile.rows):
                    with ir.vectorized(0, width) as j:
                        y[batch, row + i, head * E + column + j] = means[i][j] * totals[i, 0]

    return write_function(_operands(sizes), body)


def _operands(sizes: Sizes) -> list[Any]:
    B, T, S = sizes.B, sizes.T, sizes.S
    return [
        ("q", (B, T, sizes.heads * sizes.D), "float32"),
        ("k", (B, S, sizes.kv_heads * sizes.D), "float32"),
        ("v", (B, S, sizes.kv_heads * sizes.E), "float32"),
        *([("mask", (B, S), "bool")] if sizes.has_mask else []),
        *([("log_size", (B, S), "float32")] if sizes.has_log_size else []),
        ("y", (B, T, sizes.heads * sizes.E), "float32"),
    ]


def _conditions(sizes: Sizes, kept: Any | None, t: Any, s: Any, width: int) -> list[Any]:
    """Return what must hold for query ``t`` to see key ``s``; the last panel of ``width`` has keys beyond the end."""
    conditions = [] if kept is None else [kept]
    if sizes.S % width:
        conditions.append(s < sizes.S)
    position = t + (sizes.S - sizes.T)
    if sizes.causal:
        conditions.append(s <= position)
    if sizes.window_left >= 0:
        conditions.append(s >= position - sizes.window_left)
    if sizes.window_right >= 0:
        conditions.append(s <= position + sizes.window_right)
    return conditions


KERNEL = Kernel(_emit, _accepts)
