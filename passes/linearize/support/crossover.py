"""From which length on a linear form pays: the crossover of softmax attention and the form, on the target.

Both are programs of their own, of the site's heads, one sequence and its kind of mask, at lengths that double.  They
are timed on the target where somebody measures; where nobody does, their floating-point operations are counted
instead, which is what the forms differ in as the length grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from xformopt.analysis import cost
from xformopt.passes.linearize.support.sites import Site, read_site
from xformopt.pipeline import Context
from xformopt.program import Program
from xformopt.rewrite import Reject

__all__ = ["Crossover", "crossing", "lone_attention", "lone_site"]

_SHORTEST, _LONGEST = 64, 2048
# rewrites the one attention of a program to the linear form
Linearize = Callable[[Program], Program]


@dataclass
class Crossover:
    """Finds the crossover of every kind of attention once.

    Attributes:
        context: Has the clock.
        linearize: Makes the linear form of a program that is one attention.

    """

    context: Context
    linearize: Linearize
    _known: dict[str, tuple[tuple[int, ...], float]] = field(default_factory=dict)

    def refusal(self, site: Site, length: int) -> str | None:
        """Return why a site's sequences are too short for the linear form, or None where they are long enough."""
        lengths, found = self._of(site, length)
        if length > found:
            return None
        how = (
            f"measured on {self.context.target}"
            if self.context.time is not None
            else "by floating-point operations, as nobody measures time"
        )
        if math.isinf(found):
            return f"at up to {lengths[-1]} tokens, softmax attention is cheaper ({how}); its sequences have {length}"
        return f"its sequences of {length} tokens are not longer than the crossover at {found:.0f} ({how})"

    def describe(self) -> tuple[str, ...]:
        """Return a line for the notes on each crossover."""
        return tuple(
            f"crossover with softmax attention of {what}: "
            + (f"none up to {lengths[-1]} tokens" if math.isinf(found) else f"{found:.0f} tokens")
            for what, (lengths, found) in self._known.items()
        )

    def _of(self, site: Site, length: int) -> tuple[tuple[int, ...], float]:
        what = _kind(site)
        # a length that was not measured is measured with all others: forms differ at it, too
        if what not in self._known or length not in self._known[what][0]:
            lengths = _lengths(length)
            softmax = {T: Program.parse(lone_attention(site, T)) for T in lengths}
            linear = {T: self.linearize(program) for T, program in softmax.items()}
            self._known[what] = (lengths, crossing(lengths, *self._costs(softmax, linear)))
        return self._known[what]

    def _costs(self, softmax: Mapping[int, Program], linear: Mapping[int, Program]) -> tuple[list[float], list[float]]:
        if self.context.time is None:
            return [cost(p).flops for p in softmax.values()], [cost(p).flops for p in linear.values()]
        named = {f"softmax {T}": p for T, p in softmax.items()} | {f"linear {T}": p for T, p in linear.items()}
        taken = self.context.time(named)
        return [taken[f"softmax {T}"] for T in softmax], [taken[f"linear {T}"] for T in linear]


def crossing(lengths: Sequence[int], softmax: Sequence[float], linear: Sequence[float]) -> float:
    """Return the length from which on the linear form costs less, interpolated where it changes; inf: none.

    Ratios of cost grow as powers of the length, so that logarithms are interpolated.
    """
    gains = [math.log(one / other) for one, other in zip(softmax, linear, strict=True)]
    if gains[-1] <= 0:
        return math.inf
    last = max((index for index, gain in enumerate(gains) if gain <= 0), default=-1)
    if last < 0:
        return 0.0
    share = -gains[last] / (gains[last + 1] - gains[last])
    low, high = math.log(lengths[last]), math.log(lengths[last + 1])
    return math.exp(low + share * (high - low))


def lone_attention(site: Site, length: int) -> str:
    """Return the text of a program that is nothing but a site's attention on one sequence."""
    queries, keys, values = (
        f"f32[1,{length},{heads * depth}]"
        for heads, depth in ((site.heads, site.depth), (site.kv_heads, site.depth), (site.kv_heads, site.width))
    )
    lines = [f"input %q: {queries}", f"input %k: {keys}", f"input %v: {values}"]
    operands = ["%q", "%k", "%v", "none", "none"]
    if site.key_mask is not None:
        lines.append(f"input %m: bool[1,{length}]")
        operands[3] = "%m"
    if site.bias is not None:
        lines.append(f"input %b: f32[1,{site.heads},{length},{length}]")
        operands[4] = "%b"
    while operands[-1] == "none":
        operands.pop()
    attributes = f"heads={site.heads}, kv_heads={site.kv_heads}, scale={site.scale!r}"
    attributes += ", causal=true" if site.causal else ""
    result = f"f32[1,{length},{site.heads * site.width}]"
    return "\n".join(
        [
            'program "attention" lifted',
            *lines,
            f"%y: {result} = xf.attention({', '.join(operands)}) {{{attributes}}}",
            "return y=%y\n",
        ]
    )


def lone_site(program: Program) -> Site:
    """Return the one site of such a program."""
    site = read_site(program, program.results[0])
    assert not isinstance(site, Reject), "a lone attention has no mask but a site's"
    return site


def _lengths(length: int) -> tuple[int, ...]:
    """Return what is measured: lengths that double, and the one asked for."""
    doublings = math.ceil(math.log2(max(_LONGEST, 2 * length) / _SHORTEST))
    return tuple(sorted({length, *(_SHORTEST << power for power in range(doublings + 1))}))


def _kind(site: Site) -> str:
    words = [f"{site.heads} heads of width {site.depth}"]
    words += [f"values of width {site.width}"] if site.width != site.depth else []
    words += [f"{site.kv_heads} key heads"] if site.kv_heads != site.heads else []
    words += ["causal"] if site.causal else []
    words += ["padding mask"] if site.key_mask is not None else []
    words += ["bias"] if site.bias is not None else []
    return ", ".join(words)
