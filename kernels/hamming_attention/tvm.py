"""TVM kernel of ``xf.hamming_attention``: sums of values chosen by bits; nothing is multiplied.

The weight of a pair is twice the number of bits that agree, and the two in numerator and denominator is left out.  What
agrees with bit r of a query is the sum of the values whose keys have that bit, or of the others.  Where attention is
not causal four bits at a time are one number: a key adds its value to one of 16 sums, these become what each of the 16
patterns of a query agrees with, and a query adds one of them.  Causal attention reads its sums behind every key, so
that there each bit has its own two.  One division by the number of agreeing bits ends each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.kernels.packing import packed_size
from xformopt.kernels.tvm_form import Builder, Kernel, TvmNode, Verdict
from xformopt.kernels.tvm_loops import room, write_function

__all__ = ["KERNEL", "Sizes", "hamming_attention"]

_WIDEST = 16
_BYTE, _NIBBLE = 8, 4


@dataclass(frozen=True)
class Sizes:
    """What one function is written for: sizes in the letters of ``xf.hamming_attention``, and its options."""

    B: int
    T: int
    S: int
    heads: int
    bits: int
    E: int
    has_mask: bool
    causal: bool
    eps: float

    @property
    def name(self) -> str:
        """A name for the function, the same for equal sizes only."""
        eps = f"{self.eps:.9g}".translate({ord("."): "p", ord("-"): "m", ord("+"): ""})
        sizes = [self.B, self.T, self.S, self.heads, self.bits, self.E, int(self.has_mask), int(self.causal)]
        return "_".join(["hamming_attention", *map(str, sizes), eps])

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First bit and number of bits of those that are read together."""
        step = 1 if self.causal else _NIBBLE
        return [(first, min(step, self.bits - first)) for first in range(0, self.bits, step)]


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    return None if arguments["v"].dtype == torch.float32 else "it is not in fp32"


def _emit(b: Builder, node: TvmNode) -> Any:
    given, heads = node.arguments, int(node.arguments["heads"])
    (B, T, _), (_, S, width) = node.shape_of("q"), node.shape_of("v")
    sizes = Sizes(
        B,
        T,
        S,
        heads,
        int(given["bits"]),
        width // heads,
        has_mask=given["key_mask"] is not None,
        causal=bool(given["causal"]),
        eps=float(given["eps"]),
    )
    names = ["q", "k", "v", *(["key_mask"] if sizes.has_mask else [])]
    return b.call(sizes.name, lambda: hamming_attention(sizes), [b.value(given[name]) for name in names], node.shape)


def hamming_attention(sizes: Sizes) -> Any:
    """Return the function of q, k (packed bits), v ``[B, S, heads * E]``, and the mask ``[B, S]`` where it has one."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    z, E, groups = sizes, sizes.E, sizes.groups
    lanes = next(lanes for lanes in range(min(_WIDEST, E), 0, -1) if E % lanes == 0)
    held_bytes = packed_size(z.bits, 1)
    firsts = [sum(1 << count for _, count in groups[:g]) for g in range(len(groups))]
    rows = sum(1 << count for _, count in groups)

    def places(codes: Any, b: Any, t: Any, head: Any) -> list[Any]:
        """Return the row of the tables that each group of bits of a code stands for."""
        found = []
        for (bit, count), first in zip(groups, firsts, strict=True):
            byte = codes[b, t, head * held_bytes + bit // _BYTE].astype("int32")
            found.append(first + (byte >> bit % _BYTE & (1 << count) - 1))
        return found

    def body(*buffers: Any) -> None:
        q, k, v = (ir.buffer_proxy(buffer) for buffer in buffers[:3])
        mask = ir.buffer_proxy(buffers[3]) if z.has_mask else None
        y = ir.buffer_proxy(buffers[-1])
        with ir.parallel(0, z.B * z.heads) as task:
            b, head = task // z.heads, task % z.heads
            sums, counts, held = room((rows, E)), room((rows,), "int32"), room((1,))
            with ir.serial(0, rows) as row:
                counts[row] = tirx.const(0, "int32")
                with ir.serial(0, E // lanes) as part, ir.vectorized(0, lanes) as j:
                    sums[row, part * lanes + j] = ir.float32(0.0)

            def add(s: Any) -> None:
                chosen = places(k, b, s, head)
                for row in chosen:
                    counts[row] = counts[row] + 1
                with ir.serial(0, E // lanes) as part:
                    for row in chosen:
                        with ir.vectorized(0, lanes) as j:
                            e = part * lanes + j
                            sums[row, e] = sums[row, e] + v[b, s, head * E + e]

            def add_unhidden(s: Any) -> None:
                if mask is None:
                    add(s)
                    return
                with ir.If(mask[b, s]), ir.Then():
                    add(s)

            def answer(t: Any) -> None:
                chosen = places(q, b, t, head)
                # half of everything, so half of eps
                held[0] = sum(counts[row] for row in chosen).astype("float32") + ir.float32(z.eps / 2)
                with ir.serial(0, E // lanes) as part, ir.vectorized(0, lanes) as j:
                    e = part * lanes + j
                    y[b, t, head * E + e] = sum(sums[row, e] for row in chosen[1:]) + sums[chosen[0], e]
                with ir.serial(0, E // lanes) as part, ir.vectorized(0, lanes) as j:
                    e = part * lanes + j
                    y[b, t, head * E + e] = y[b, t, head * E + e] / held[0]

            if z.causal:
                with ir.serial(0, z.T) as t:
                    add_unhidden(t)
                    answer(t)
            else:
                with ir.serial(0, z.S) as s:
                    add_unhidden(s)
                _agreeing(z, sums, counts, lanes)
                with ir.serial(0, z.T) as t:
                    answer(t)

    operands = [
        ("q", (z.B, z.T, z.heads * held_bytes), "uint8"),
        ("k", (z.B, z.S, z.heads * held_bytes), "uint8"),
        ("v", (z.B, z.S, z.heads * E), "float32"),
        *([("mask", (z.B, z.S), "bool")] if z.has_mask else []),
        ("y", (z.B, z.T, z.heads * E), "float32"),
    ]
    return write_function(operands, body)


def _agreeing(sizes: Sizes, sums: Any, counts: Any, lanes: int) -> None:
    """Turn the sums over keys of each pattern into sums over the bits in which keys agree with it.

    First by bit: the keys that have it, and those that have not; then a pattern takes one of both for each bit.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    first = 0
    for _, count in sizes.groups:
        patterns, start = range(1 << count), first
        first += len(patterns)
        by_bit, by_bit_counts = room((2 * count, lanes)), room((2 * count,), "int32")
        for bit in range(count):
            for value in (0, 1):
                having = [start + pattern for pattern in patterns if pattern >> bit & 1 == value]
                by_bit_counts[2 * bit + value] = sum((counts[row] for row in having), tirx.const(0, "int32"))
        for pattern in patterns:
            chosen = [2 * bit + (pattern >> bit & 1) for bit in range(count)]
            counts[start + pattern] = sum((by_bit_counts[row] for row in chosen), tirx.const(0, "int32"))
        with ir.serial(0, sizes.E // lanes) as part:
            for bit in range(count):
                for value in (0, 1):
                    having = [start + pattern for pattern in patterns if pattern >> bit & 1 == value]
                    with ir.vectorized(0, lanes) as j:
                        e = part * lanes + j
                        by_bit[2 * bit + value, j] = sum((sums[row, e] for row in having[1:]), sums[having[0], e])
            for pattern in patterns:
                chosen = [2 * bit + (pattern >> bit & 1) for bit in range(count)]
                with ir.vectorized(0, lanes) as j:
                    e = part * lanes + j
                    sums[start + pattern, e] = sum((by_bit[row, j] for row in chosen[1:]), by_bit[chosen[0], j])


KERNEL = Kernel(_emit, _accepts)
