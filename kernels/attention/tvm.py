"""TVM kernel of ``xf.attention``: the four steps over all heads, each a loop that vectorizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
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

    @property
    def name(self) -> str:
        """A name for the function, the same for equal sizes only."""
        sizes = [self.B, self.T, self.S, self.heads, self.kv_heads, self.D, self.E]
        hiding = [int(self.has_mask), int(self.causal), self.window_left + 1, self.window_right + 1]
        scale = f"{self.scale:.9g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})
        return "_".join(["attention", *map(str, [*sizes, *hiding]), scale])


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["q"].dtype != torch.float32:
        return "it is not in fp32"
    if arguments["bias"] is not None or arguments["key_log_size"] is not None:
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
    )
    names = ["q", "k", "v", *(["key_mask"] if sizes.has_mask else [])]
    return b.call(sizes.name, lambda: attention(sizes), [b.value(given[name]) for name in names], node.shape)


def attention(sizes: Sizes) -> Any:
    """Return the function of q ``[B, T, heads D]``, k ``[B, S, kv_heads D]``, v ``[B, S, kv_heads E]`` and the mask.

    Keys are laid out anew, ``[B, kv_heads, D, S]``, so that logits are computed along the keys, as many at once as a
    register holds.  A query that sees no key gets zeros.
    """
    from tvm import s_tir, te, tirx

    B, T, S, H, D, E = sizes.B, sizes.T, sizes.S, sizes.heads, sizes.D, sizes.E
    shared = H // sizes.kv_heads
    q = te.placeholder((B, T, H * D), "float32", name="q")
    k = te.placeholder((B, S, sizes.kv_heads * D), "float32", name="k")
    v = te.placeholder((B, S, sizes.kv_heads * E), "float32", name="v")
    mask = te.placeholder((B, S), "bool", name="mask")
    hidden = tirx.const(_HIDDEN, "float32")

    keys = te.compute((B, sizes.kv_heads, D, S), lambda b, h, d, s: k[b, s, h * D + d], name="keys")
    d = te.reduce_axis((0, D), name="d")
    products = te.compute(
        (B, H, T, S),
        lambda b, h, t, s: te.sum(q[b, t, h * D + d] * keys[b, h // shared, d, s], axis=d),
        name="products",
    )

    def logit(b: Any, h: Any, t: Any, s: Any) -> Any:
        value = products[b, h, t, s] * tirx.const(sizes.scale, "float32")
        for visible in _conditions(sizes, mask[b, s] if sizes.has_mask else None, t, s):
            value = tirx.Select(visible, value, hidden)
        return value

    logits = te.compute((B, H, T, S), logit, name="logits")
    s = te.reduce_axis((0, S), name="s")
    peaks = te.compute((B, H, T), lambda b, h, t: te.max(logits[b, h, t, s], axis=s), name="peaks")

    def weight(b: Any, h: Any, t: Any, s: Any) -> Any:
        # where every key is hidden the difference is 0, and the weight must not be 1
        seen = logits[b, h, t, s] > hidden
        return tirx.Select(seen, exp(logits[b, h, t, s] - peaks[b, h, t]), tirx.const(0.0, "float32"))

    weights = te.compute((B, H, T, S), weight, name="weights")
    s2 = te.reduce_axis((0, S), name="s2")
    totals = te.compute((B, H, T), lambda b, h, t: te.sum(weights[b, h, t, s2], axis=s2), name="totals")
    s3 = te.reduce_axis((0, S), name="s3")
    sums = te.compute(
        (B, H, T, E),
        lambda b, h, t, e: te.sum(weights[b, h, t, s3] * v[b, s3, (h // shared) * E + e], axis=s3),
        name="sums",
    )

    def mean(b: Any, t: Any, c: Any) -> Any:
        return sums[b, c // E, t, c % E] / tirx.max(totals[b, c // E, t], tirx.const(1e-30, "float32"))

    y = te.compute((B, T, H * E), mean, name="means")
    schedule = s_tir.Schedule(te.create_prim_func([q, k, v, *([mask] if sizes.has_mask else []), y]))
    for name in ("keys", "logits", "weights", "means"):
        _parallel_outer(schedule, schedule.get_sblock(name), inner=1)
    for name in ("peaks", "totals"):
        _parallel_outer(schedule, schedule.get_sblock(name), inner=1)
    for name in ("products", "sums"):
        _schedule_product(schedule, schedule.get_sblock(name))
    return schedule.mod["main"]


def _conditions(sizes: Sizes, kept: Any | None, t: Any, s: Any) -> list[Any]:
    """Return what must hold for query ``t`` to see key ``s``."""
    conditions = [] if kept is None else [kept]
    position = t + (sizes.S - sizes.T)
    if sizes.causal:
        conditions.append(s <= position)
    if sizes.window_left >= 0:
        conditions.append(s >= position - sizes.window_left)
    if sizes.window_right >= 0:
        conditions.append(s <= position + sizes.window_right)
    return conditions


def _parallel_outer(schedule: Any, block: Any, inner: int) -> None:
    loops = schedule.get_loops(block)
    schedule.parallel(schedule.fuse(*loops[:-inner]))


def _schedule_product(schedule: Any, block: Any) -> None:
    """Threads over batch, head and row; in a row, one step of the sum adds to every column."""
    *outer, column, summed = schedule.get_loops(block)
    schedule.reorder(summed, column)
    schedule.parallel(schedule.fuse(*outer))
    schedule.vectorize(column)
    start = schedule.decompose_reduction(block, summed)
    schedule.vectorize(schedule.get_loops(start)[-1])


KERNEL = Kernel(_emit, _accepts)
