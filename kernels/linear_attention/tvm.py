"""TVM kernel of ``xf.linear_attention``: a thread takes one head, whose state stays in its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import fill, lane_sums, room, write_function
from xformopt.kernels.tvm_math import exp

__all__ = ["KERNEL", "Sizes", "linear_attention"]

_WIDEST = 16


@dataclass(frozen=True)
class Sizes:
    """What one function is written for: sizes in the letters of ``xf.linear_attention``, and its options."""

    B: int
    T: int
    S: int
    heads: int
    D: int
    E: int
    feature: str
    has_mask: bool
    causal: bool
    normalize: bool
    eps: float

    @property
    def name(self) -> str:
        """A name for the function, the same for equal sizes only."""
        options = [int(self.has_mask), int(self.causal), int(self.normalize)]
        eps = f"{self.eps:.9g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})
        sizes = [self.B, self.T, self.S, self.heads, self.D, self.E]
        return "_".join(["linear_attention", self.feature, *map(str, [*sizes, *options]), eps])


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    if arguments["q"].dtype != torch.float32:
        return "it is not in fp32"
    return None if arguments["feature"] in ("elu", "given") else "its feature map has a projection"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, heads = node.arguments, int(node.arguments["heads"])
    (B, T, width), (_, S, value_width) = node.shape_of("q"), node.shape_of("v")
    sizes = Sizes(
        B,
        T,
        S,
        heads,
        width // heads,
        value_width // heads,
        feature=str(given["feature"]),
        has_mask=given["key_mask"] is not None,
        causal=bool(given["causal"]),
        normalize=bool(given["normalize"]),
        eps=float(given["eps"]),
    )
    names = ["q", "k", "v", *(["key_mask"] if sizes.has_mask else [])]
    return b.call(sizes.name, lambda: linear_attention(sizes), [b.value(given[name]) for name in names], node.shape)


def linear_attention(sizes: Sizes) -> Any:
    """Return the function of q ``[B, T, heads * D]``, k, v, and the mask ``[B, S]`` where it has one.

    The state is ``phi(k)^T v`` over all keys; causal attention reads it after each token it adds.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    z, D, E = sizes, sizes.D, sizes.E
    depth_lanes, value_lanes = (_lanes(size) for size in (D, E))

    def phi(x: Any) -> Any:
        return x if z.feature == "given" else tirx.Select(x > ir.float32(0.0), x + ir.float32(1.0), exp(x))

    def body(*buffers: Any) -> None:
        q, k, v = (ir.buffer_proxy(buffer) for buffer in buffers[:3])
        mask = ir.buffer_proxy(buffers[3]) if z.has_mask else None
        y = ir.buffer_proxy(buffers[-1])
        with ir.parallel(0, z.B * z.heads) as task:
            b, head = task // z.heads, task % z.heads
            state, weights, features, held = room((D, E)), room((1, D)), room((1, D)), room((1, E))
            products = room((1, depth_lanes))
            fill_all(state, weights)

            def read(x: Any, t: Any) -> None:
                with ir.serial(0, D // depth_lanes) as part, ir.vectorized(0, depth_lanes) as j:
                    features[0, part * depth_lanes + j] = phi(x[b, t, head * D + part * depth_lanes + j])

            def add(s: Any) -> None:
                read(k, s)
                with ir.serial(0, D // depth_lanes) as part, ir.vectorized(0, depth_lanes) as j:
                    c = part * depth_lanes + j
                    weights[0, c] = weights[0, c] + features[0, c]
                with ir.serial(0, D) as d, ir.serial(0, E // value_lanes) as part, ir.vectorized(0, value_lanes) as j:
                    e = part * value_lanes + j
                    state[d, e] = state[d, e] + features[0, d] * v[b, s, head * E + e]

            def add_unhidden(s: Any) -> None:
                if mask is None:
                    add(s)
                    return
                with ir.If(mask[b, s]), ir.Then():
                    add(s)

            def answer(t: Any) -> None:
                read(q, t)
                with ir.serial(0, E // value_lanes) as part, ir.vectorized(0, value_lanes) as j:
                    held[0, part * value_lanes + j] = ir.float32(0.0)
                with ir.serial(0, D) as d, ir.serial(0, E // value_lanes) as part, ir.vectorized(0, value_lanes) as j:
                    e = part * value_lanes + j
                    held[0, e] = held[0, e] + features[0, d] * state[d, e]
                fill(products, 1, depth_lanes, 0.0)
                with ir.serial(0, D // depth_lanes) as part, ir.vectorized(0, depth_lanes) as j:
                    c = part * depth_lanes + j
                    products[0, j] = products[0, j] + features[0, c] * weights[0, c]
                total = lane_sums(products, 0, depth_lanes, lambda a, b: a + b) + ir.float32(z.eps)
                with ir.serial(0, E // value_lanes) as part, ir.vectorized(0, value_lanes) as j:
                    e = part * value_lanes + j
                    y[b, t, head * E + e] = held[0, e] / total if z.normalize else held[0, e]

            if z.causal:
                with ir.serial(0, z.T) as t:
                    add_unhidden(t)
                    answer(t)
            else:
                with ir.serial(0, z.S) as s:
                    add_unhidden(s)
                with ir.serial(0, z.T) as t:
                    answer(t)

    def fill_all(state: Any, weights: Any) -> None:
        with ir.serial(0, D) as d:
            weights[0, d] = ir.float32(0.0)
            with ir.serial(0, E // value_lanes) as part, ir.vectorized(0, value_lanes) as j:
                state[d, part * value_lanes + j] = ir.float32(0.0)

    operands = [
        ("q", (z.B, z.T, z.heads * D), "float32"),
        ("k", (z.B, z.S, z.heads * D), "float32"),
        ("v", (z.B, z.S, z.heads * E), "float32"),
        *([("mask", (z.B, z.S), "bool")] if z.has_mask else []),
        ("y", (z.B, z.T, z.heads * E), "float32"),
    ]
    return write_function(operands, body)


def _lanes(size: int) -> int:
    """Return the widest vector that divides ``size``."""
    return next(lanes for lanes in range(min(_WIDEST, size), 0, -1) if size % lanes == 0)


KERNEL = Kernel(_emit, _accepts)
