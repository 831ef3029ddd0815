"""TVM kernel of ``xf.attention``: a thread takes a few queries of one head through all steps, in its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.kernels.tvm_form import Builder, Kernel, Tile, TvmNode, Verdict
from xformopt.kernels.tvm_loops import add_tile, fill, lane_sums, registers, room, starts, write_function
from xformopt.kernels.tvm_math import exp

__all__ = ["HIDDEN", "KERNEL", "Logits", "Sizes", "attention", "emit", "refusal", "total_of"]

# what a hidden key's logit is: its weight is 0 beside any other, and a row of nothing but these stays finite
HIDDEN = -1e30


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
    bias: tuple[int, ...] = ()

    @staticmethod
    def of(node: TvmNode) -> Sizes:
        """Return the sizes of a node that has the operands and attributes of ``xf.attention``."""
        given = node.arguments
        (B, T, width), (_, S, _) = node.shape_of("q"), node.shape_of("k")
        heads, kv_heads = int(given["heads"]), int(given["kv_heads"])
        shape = () if given["bias"] is None else node.shape_of("bias")
        return Sizes(
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
            bias=(1,) * (4 - len(shape)) * bool(shape) + shape,
        )

    @property
    def name(self) -> str:
        """A name for the function, the same for equal sizes only."""
        sizes = [self.B, self.T, self.S, self.heads, self.kv_heads, self.D, self.E]
        hiding = [int(self.has_mask), int(self.causal), self.window_left + 1, self.window_right + 1]
        scale = f"{self.scale:.9g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})
        added = [*(["sizes"] if self.has_log_size else []), *(["bias", *map(str, self.bias)] if self.bias else [])]
        return "_".join(["attention", *map(str, [*sizes, *hiding]), scale, *added])

    @property
    def operands(self) -> list[Any]:
        """Name, shape and dtype of what the function reads, in order."""
        B, T, S = self.B, self.T, self.S
        return [
            ("q", (B, T, self.heads * self.D), "float32"),
            ("k", (B, S, self.kv_heads * self.D), "float32"),
            ("v", (B, S, self.kv_heads * self.E), "float32"),
            *([("key_mask", (B, S), "bool")] if self.has_mask else []),
            *([("bias", self.bias, "float32")] if self.bias else []),
            *([("key_log_size", (B, S), "float32")] if self.has_log_size else []),
        ]


def refusal(arguments: Mapping[str, Any]) -> Verdict:
    """Take fp32, with a bias of at most four axes."""
    bias = arguments["bias"]
    if arguments["q"].dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return "it is not in fp32"
    return None


def emit(b: Builder, node: TvmNode, sizes: Sizes, name: str, write: Callable[[Tile], Any], *others: Any) -> Any:
    """Call the function that ``write`` writes for a tile, on the operands that attention has, and ``others``."""
    T, width = sizes.T, 2 * b.machine.lanes
    heights = range(min(4, T), min(T, (b.machine.registers - 4) // 2) + 1)
    tile = b.tile(
        name,
        write,
        Tile(Tile.of(b.machine, T, sizes.S).rows, width),
        [Tile(height, width) for height in sorted(heights, key=lambda height: -(-T // height) * height)],
    )
    operands = []
    for operand, shape, _ in sizes.operands:
        value = b.value(node.arguments[operand])
        operands.append(value if node.shape_of(operand) == shape else b.reshape(value, shape))
    return b.call(name, lambda: write(tile), [*operands, *others], node.shape)


def _emit(b: Builder, node: TvmNode) -> Any:
    sizes = Sizes.of(node)
    return emit(b, node, sizes, sizes.name, lambda tile: attention(sizes, tile))


class Logits:
    """What a task of attention begins with: which queries it has, and their logits.

    Keys are laid out anew, ``[B kv_heads, panels, D, columns]``, so that logits are computed along the keys.  Then each
    task takes ``tile.rows`` queries of one head; its logits, ``[rows, S]``, stay in the cache.

    Attributes:
        batch: Of the task's queries.
        head: Theirs.
        shared: The head of keys and values that serves them.
        row: The first of the queries.
        values: The logits, ``[rows, panels * columns]``, ``HIDDEN`` where a key is hidden or does not exist.
        peaks: ``[rows, columns]``, whose largest is the row's.

    """

    def __init__(self, sizes: Sizes, tile: Tile, buffers: Sequence[Any]) -> None:
        from tvm.script.ir_builder import tirx as ir

        self.sizes, self.tile = sizes, tile
        self.panels, self.stripes = -(-sizes.S // tile.columns), -(-sizes.T // tile.rows)
        self.tasks = sizes.B * sizes.heads * self.stripes
        names = [name for name, _, _ in sizes.operands]
        self.given = {name: ir.buffer_proxy(buffer) for name, buffer in zip(names, buffers, strict=False)}
        self.keys = room((sizes.B * sizes.kv_heads, self.panels, sizes.D, tile.columns))
        self._lay_out_keys()

    def _lay_out_keys(self) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as ir

        z, columns = self.sizes, self.tile.columns
        with ir.parallel(0, z.B * z.kv_heads * self.panels) as part:
            head, panel = part // self.panels, part % self.panels
            with ir.serial(0, z.D) as d, ir.vectorized(0, columns) as j:
                s = tirx.min(panel * columns + j, z.S - 1)
                self.keys[head, panel, d, j] = self.given["k"][head // z.kv_heads, s, head % z.kv_heads * z.D + d]

    def compute(self, task: Any) -> None:
        """Compute the logits of a task."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as ir

        z, tile, q = self.sizes, self.tile, self.given["q"]
        batch, head = task // (z.heads * self.stripes), task // self.stripes % z.heads
        shared, row = head // (z.heads // z.kv_heads), starts(task % self.stripes, tile.rows, z.T)
        self.batch, self.head, self.shared, self.row = batch, head, shared, row
        self.values = room((tile.rows, self.panels * tile.columns))
        self.peaks = room((tile.rows, tile.columns))
        fill(self.peaks, tile.rows, tile.columns, 2 * HIDDEN)
        with ir.serial(0, self.panels) as panel:
            sums = registers(tile.rows, tile.columns)
            with ir.serial(0, z.D) as d:
                add_tile(
                    sums,
                    tile.columns,
                    lambda i: q[batch, row + i, head * z.D + d],
                    lambda j: self.keys[batch * z.kv_heads + shared, panel, d, j],
                )
            for i in range(tile.rows):
                with ir.vectorized(0, tile.columns) as j:
                    s = panel * tile.columns + j
                    logit = self._whole(sums[i][j] * ir.float32(z.scale), row + i, s)
                    self.values[i, s] = logit
                    self.peaks[i, j] = tirx.max(self.peaks[i, j], logit)

    def _whole(self, logit: Any, t: Any, s: Any) -> Any:
        """Add what is added to a logit, and hide it where query ``t`` does not see key ``s``."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as ir

        z, given, last = self.sizes, self.given, tirx.min(s, self.sizes.S - 1)
        if z.bias:
            places = (self.batch, self.head, t, last)
            logit = logit + given["bias"][tuple(p if n > 1 else 0 for p, n in zip(places, z.bias, strict=True))]
        if z.has_log_size:
            logit = logit + given["key_log_size"][self.batch, last]
        kept = given["key_mask"][self.batch, last] if z.has_mask else None
        for visible in _conditions(z, kept, t, s, self.tile.columns):
            logit = tirx.Select(visible, logit, ir.float32(HIDDEN))
        return logit


def total_of(logits: Logits, i: Any, totals: Any, keep: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """Add up the weights of row ``i`` in ``totals``; return peak and sum.  ``keep`` is given each place and weight."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    columns, values = logits.tile.columns, logits.values
    peak = lane_sums(logits.peaks, i, columns, tirx.max)
    with ir.serial(0, logits.panels) as panel, ir.vectorized(0, columns) as j:
        s = panel * columns + j
        # where every key is hidden the difference is 0, and the weight must not be 1
        weight = tirx.Select(values[i, s] > ir.float32(HIDDEN), exp(values[i, s] - peak), ir.float32(0.0))
        totals[i, j] = totals[i, j] + weight
        keep(s, weight)
    return peak, lane_sums(totals, i, columns, lambda a, b: a + b)


def attention(sizes: Sizes, tile: Tile) -> Any:
    """Return the function of q ``[B, T, heads D]``, k ``[B, S, kv_heads D]``, v ``[B, S, kv_heads E]``, and the others.

    A query that sees no key gets zeros.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    S, E = sizes.S, sizes.E

    def body(*buffers: Any) -> None:
        v, y = ir.buffer_proxy(buffers[2]), ir.buffer_proxy(buffers[-1])
        logits = Logits(sizes, tile, buffers)
        with ir.parallel(0, logits.tasks) as task:
            logits.compute(task)
            batch, head, shared, row, weights = logits.batch, logits.head, logits.shared, logits.row, logits.values
            totals = room((tile.rows, tile.columns))
            fill(totals, tile.rows, tile.columns, 0.0)
            with ir.serial(0, tile.rows) as i:

                def keep(s: Any, weight: Any, i: Any = i) -> None:
                    weights[i, s] = weight

                _, total = total_of(logits, i, totals, keep)
                totals[i, 0] = ir.float32(1.0) / tirx.max(total, ir.float32(1e-30))
            width = min(tile.columns, E)
            with ir.serial(0, -(-E // width)) as part:
                column = starts(part, width, E)
                means = registers(tile.rows, width)
                with ir.serial(0, S) as s:
                    add_tile(means, width, lambda i: weights[i, s], lambda j: v[batch, s, shared * E + column + j])
                for i in range(tile.rows):
                    with ir.vectorized(0, width) as j:
                        y[batch, row + i, head * E + column + j] = means[i][j] * totals[i, 0]

    result = ("y", (sizes.B, sizes.T, sizes.heads * E), "float32")
    return write_function([*sizes.operands, result], body)


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


KERNEL = Kernel(_emit, refusal)
