"""TVM kernel of ``xf.log_attention``: weights become codes, values are added up by code, and codes are shifts.

The code of a weight comes from its logit, ``(r / q) (log2 sum_j e^(l_j - max) + (max - l_i) log2 e + log2 s)``, without
the weight itself.  Each key adds its value to the sum of its code.  The sums of codes that share an entry of the table
are shifted (2^-n taken off the exponent of a float) and added; an entry of few bits then is a few more shifts, and one
product with ``s / (2^(bits+1) - 2)`` ends each output.  Where the table is not rounded its entries are multiplied with:
as many as there are, not as there are keys.

Sums below 2^-60, and shifts beyond 2^-60, count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from xformopt.kernels.attention.tvm import HIDDEN, Logits, Sizes, emit, refusal, total_of
from xformopt.kernels.log_quantize.reference import log_table
from xformopt.kernels.tvm_form import Builder, Kernel, Tile, TvmNode, Verdict
from xformopt.kernels.tvm_loops import fill, flat, room, write_function
from xformopt.kernels.tvm_math import log2

__all__ = ["KERNEL", "MOST_BITS", "Levels", "additions", "log_attention"]

# a sum of values for each code must fit the cache
MOST_BITS = 6
_WIDEST, _MANTISSA_BITS, _FARTHEST = 16, 23, 60


@dataclass(frozen=True)
class Levels:
    """What codes stand for: the attributes of ``xf.log_quantize``."""

    bits: int
    numerator: int
    denominator: int
    round_table: bool
    flush: bool

    @property
    def entries(self) -> dict[int, list[tuple[int, int]]]:
        """The codes that share an entry of the table, with the shift of each, by the entry's place."""
        found: dict[int, list[tuple[int, int]]] = {}
        for code in range(2**self.bits):
            shift, place = divmod(code * self.numerator, self.denominator)
            found.setdefault(place, []).append((code, shift))
        return found

    @property
    def unit(self) -> float:
        """What a rounded entry of 1 is worth."""
        return 1 / (2 ** (self.bits + 1) - 2) if self.round_table else 1.0

    def entry(self, place: int) -> float:
        """Return an entry of the table, in units."""
        return float(log_table(self.bits, self.denominator, self.round_table)[place]) / self.unit

    @property
    def name(self) -> str:
        """Equal for equal levels only."""
        return "_".join(map(str, (self.bits, self.numerator, self.denominator, int(self.round_table), int(self.flush))))


def _accepts(arguments: Mapping[str, Any]) -> Verdict:
    hides = arguments["key_mask"] is not None or arguments["causal"]
    hides = hides or arguments["window_left"] >= 0 or arguments["window_right"] >= 0
    if arguments["bits"] > MOST_BITS:
        return f"its codes have more than {MOST_BITS} bits"
    if hides and not arguments["flush"]:
        return "keys that are hidden have the smallest level, not 0"
    return refusal(arguments)


def _emit(b: Builder, node: TvmNode) -> Any:
    given, sizes = node.arguments, Sizes.of(node)
    levels = Levels(
        int(given["bits"]),
        int(given["numerator"]),
        int(given["denominator"]),
        round_table=bool(given["round_table"]),
        flush=bool(given["flush"]),
    )
    name = f"log_{sizes.name}_levels_{levels.name}"
    scale = b.value(given["level_scale"])
    return emit(b, node, sizes, name, lambda tile: log_attention(sizes, levels, tile), scale)


def log_attention(sizes: Sizes, levels: Levels, tile: Tile) -> Any:
    """Return the function of the operands that attention has, and the scale of the levels."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    S, E, count = sizes.S, sizes.E, 2**levels.bits
    lanes = next(lanes for lanes in range(min(_WIDEST, E), 0, -1) if E % lanes == 0)
    parts = E // lanes
    rate = levels.denominator / levels.numerator

    def body(*buffers: Any) -> None:
        v, y = ir.buffer_proxy(buffers[2]), ir.buffer_proxy(buffers[-1])
        scale = flat(buffers[len(sizes.operands)], (1,))
        logits = Logits(sizes, tile, buffers)
        with ir.parallel(0, logits.tasks) as task:
            logits.compute(task)
            batch, head, row, values = logits.batch, logits.head, logits.row, logits.values
            width = logits.panels * tile.columns
            codes, totals, held = room((tile.rows, width), "int32"), room((tile.rows, tile.columns)), room((2,))
            fill(totals, tile.rows, tile.columns, 0.0)
            with ir.serial(0, tile.rows) as i:
                peak, total = total_of(logits, i, totals, lambda s, weight: None)
                held[0] = peak
                held[1] = log2(tirx.max(total, ir.float32(1e-30))) + log2(scale[0])
                with ir.serial(0, logits.panels) as panel, ir.vectorized(0, tile.columns) as j:
                    s = panel * tile.columns + j
                    logs = held[1] + (held[0] - values[i, s]) * ir.float32(math.log2(math.e))
                    code = tirx.nearbyint(logs * ir.float32(rate))
                    # what is below every level has a sum of its own
                    last = ir.float32(count if levels.flush else count - 1)
                    code = tirx.max(tirx.min(code, last), ir.float32(0.0)).astype("int32")
                    codes[i, s] = tirx.Select(values[i, s] > ir.float32(HIDDEN), code, tirx.const(count, "int32"))
            sums = room((tile.rows, count + 1, E))
            every = (count + 1) * parts
            with ir.serial(0, tile.rows) as i, ir.serial(0, every) as step, ir.vectorized(0, lanes) as j:
                sums[i, step // parts, step % parts * lanes + j] = ir.float32(0.0)
            with ir.serial(0, S) as s:
                for i in range(tile.rows):
                    with ir.serial(0, parts) as part, ir.vectorized(0, lanes) as j:
                        e = part * lanes + j
                        value = v[batch, s, logits.shared * E + e]
                        sums[i, codes[i, s], e] = sums[i, codes[i, s], e] + value
            with ir.serial(0, tile.rows) as i, ir.serial(0, parts) as part:
                read = partial(_read, sums, i, part * lanes)
                result = _weighed(levels, read, lanes)
                with ir.vectorized(0, lanes) as j:
                    outcome = result[j] * (scale[0] * ir.float32(levels.unit))
                    y[batch, row + i, head * E + part * lanes + j] = outcome

    result = ("y", (sizes.B, sizes.T, sizes.heads * E), "float32")
    return write_function([*sizes.operands, ("level_scale", (), "float32"), result], body)


def _read(sums: Any, i: Any, first: Any, code: int, j: Any) -> Any:
    return sums[i, code, first + j]


def _weighed(levels: Levels, read: Any, lanes: int) -> Any:
    """Return the sums of all codes, each times what it stands for in units, as an array of ``lanes`` numbers."""
    from tvm.script.ir_builder import tirx as ir

    result, shared = room((lanes,)), room((lanes,))
    with ir.vectorized(0, lanes) as j:
        result[j] = ir.float32(0.0)
    for place, codes in levels.entries.items():
        entry = levels.entry(place)
        near = [(code, shift) for code, shift in codes if shift <= _FARTHEST]
        if not near or entry == 0:
            continue
        with ir.vectorized(0, lanes) as j:
            terms = [_shifted(read(code, j), -shift) for code, shift in near]
            shared[j] = sum(terms[1:], terms[0])
        with ir.vectorized(0, lanes) as j:
            if levels.round_table:
                for exponent, is_negative in _digits(round(entry)):
                    term = _shifted(shared[j], exponent)
                    result[j] = result[j] - term if is_negative else result[j] + term
            else:
                result[j] = result[j] + shared[j] * ir.float32(entry)
    return result


def additions(levels: Levels) -> int:
    """Return how many shifted terms an output takes behind the sums of all codes: what the kernel adds for each."""
    total = 0
    for place, codes in levels.entries.items():
        near = [code for code, shift in codes if shift <= _FARTHEST]
        if near and (entry := levels.entry(place)):
            total += len(near) + (len(_digits(round(entry))) if levels.round_table else 1)
    return total


def _shifted(value: Any, exponent: int) -> Any:
    """Return ``value * 2^exponent`` by an addition to its exponent; 0 stays 0."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as ir

    if exponent == 0:
        return value
    word = tirx.reinterpret("int32", value) + tirx.const(exponent << _MANTISSA_BITS, "int32")
    counts = tirx.abs(value) > ir.float32(2.0**-_FARTHEST)
    return tirx.Select(counts, tirx.reinterpret("float32", word), ir.float32(0.0))


def _digits(number: int) -> list[tuple[int, bool]]:
    """Return a number as few powers of two, added or taken off: the exponent of each, and whether it is taken off."""
    found, exponent = [], 0
    while number:
        if number & 1:
            # a run of ones is one power less another
            is_negative = number & 3 == 3
            found.append((exponent, is_negative))
            number += 1 if is_negative else -1
        number >>= 1
        exponent += 1
    return found


KERNEL = Kernel(_emit, _accepts)
