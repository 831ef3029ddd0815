"""What the passes that make tokens fewer share: how many leave behind which layer, as asked for or by a budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

from torch import fx

from xformopt.analysis import cost
from xformopt.errors import PassError
from xformopt.passes.fuse.fuse_add_norm import FuseAddNorm
from xformopt.passes.tokens.support.token_flow import Reducer, shorten
from xformopt.passes.tokens.support.token_stream import TokenStream, find_stream, plain
from xformopt.passes.tokenwise import RefusalError, place_of
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program
from xformopt.rewrite import Fired, Region, Rejected

__all__ = ["TokenReduction"]

Plan: TypeAlias = dict[int, int]


@dataclass(frozen=True)
class TokenReduction(Pass):
    """A pass that lets tokens leave behind layers of attention, by a schedule that is fixed when it runs.

    Attributes:
        r: Tokens that leave behind each layer; None: as many as ``fewer_flops`` needs.
        fewer_flops: Share of the program's floating-point operations to save, at its example sizes.
        layers: Behind which layers tokens leave, counted from 0.
        prefix: Tokens at the front that stay; None: class and distillation token, where they are found.

    """

    r: int | None = None
    fewer_flops: float = 0.3
    layers: tuple[int, ...] | None = None
    prefix: int | None = None

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.r is not None and self.r < 0:
            raise ValueError(f"r must not be negative, but is {self.r}")
        if not 0 < self.fewer_flops < 1:
            raise ValueError(f"fewer_flops must lie between 0 and 1, but is {self.fewer_flops}")

    @abstractmethod
    def reducer(self, program: Program, stream: TokenStream, context: Context) -> Callable[[], Reducer]:
        """Return what makes a reducer for one walk over ``program``."""

    def default_layers(self, count: int) -> list[int]:
        """Return behind which of ``count`` layers tokens leave where none are named: all."""
        return list(range(count))

    @abstractmethod
    def most(self, tokens: int) -> int:
        """Return how many of ``tokens`` behind the prefix may leave at one place."""

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the stream, make the plan, and shorten."""
        start = plain(program)
        try:
            stream = self._stream(start)
            make = self.reducer(start, stream, context)

            def build(plan: Mapping[int, int]) -> Program:
                return shorten(start, plan, make(), self.prefix)

            plan = self._plan(program, stream, build, context)
            if not any(plan.values()):
                return PassResult(program, False, notes=("no token is to leave: nothing was changed",))
            changed = build(plan)
        except RefusalError as refusal:
            name = refusal.node.name if refusal.node is not None else ""
            rejected = Rejected(self.name, place_of(refusal.node), name, refusal.reason)
            return PassResult(program, False, rejected=(rejected,))
        if program.level == Level.TARGET:
            changed = FuseAddNorm().run(changed, context).program
            changed.level = Level.TARGET
        saved = 1 - cost(changed).flops / cost(program).flops
        fired = tuple(self._fired(stream, index) for index, r in plan.items() if r)
        note = f"{_describe(stream, plan)}: {saved:.1%} fewer floating-point operations"
        return PassResult(changed, True, fired, notes=(note,))

    def _stream(self, program: Program) -> TokenStream:
        found = find_stream(program)
        return found if self.prefix is None else replace(found, prefix=self.prefix)

    def _fired(self, stream: TokenStream, index: int) -> Fired:
        """Record one place; the values before and after differ in shape, so that there is nothing to align."""
        graph = fx.Graph()
        graph.output(())
        return Fired(self.name, place_of(stream.layers[index].stream), *[Region(graph, (), (), {})] * 2)

    def _plan(self, program: Program, stream: TokenStream, build: Callable[[Plan], Program], context: Context) -> Plan:
        chosen = self._chosen(stream)
        shortest = self._shortest(program, stream)
        if self.r is not None:
            return self._checked(stream, dict.fromkeys(chosen, self.r), shortest)
        return self._solve(program, build, shortest * len(chosen), lambda n: self._spread(chosen, n, shortest), context)

    def _shortest(self, program: Program, stream: TokenStream) -> int:
        """Return how many tokens behind the prefix the shortest sequence has that the program takes."""
        low = program.dims.evaluate(stream.length, {dim.name: dim.low for dim in program.dims})
        if not isinstance(stream.length, int) and self.most(low - stream.prefix) < 1:
            raise PassError(
                f"The length of {program.name}'s sequences varies ({stream.length}) and may be {low}, where no token "
                f"can leave. Capture the model at a fixed length (padding is merged away first), or with a length that "
                f"has a lower bound."
            )
        return low - stream.prefix

    def _chosen(self, stream: TokenStream) -> list[int]:
        count = len(stream.layers)
        chosen = self.default_layers(count) if self.layers is None else sorted(set(self.layers))
        if wrong := [index for index in chosen if not 0 <= index < count]:
            raise PassError(
                f"There is no layer {wrong[0]}: the program has {count} layers of attention, 0 to {count - 1}. Name "
                f"layers among those."
            )
        return chosen

    def _checked(self, stream: TokenStream, plan: Plan, left: int) -> Plan:
        """Refuse a plan that takes more tokens than there are."""
        for index, r in plan.items():
            if r > self.most(left):
                raise PassError(
                    f"Behind layer {index} there are {left} tokens beside the first {stream.prefix}, of which at most "
                    f"{self.most(left)} can leave, but r is {r}. Give a smaller r, fewer layers, or a budget with "
                    f"fewer_flops."
                )
            left -= r
        return plan

    def _spread(self, chosen: list[int], total: int, left: int) -> Plan:
        """Let ``total`` tokens leave, as evenly as it goes, earlier layers first where it does not divide."""
        plan = {}
        for place, index in enumerate(chosen):
            wanted = total // len(chosen) + (place < total % len(chosen))
            plan[index] = min(wanted, self.most(left))
            left -= plan[index]
        return plan

    def _solve(
        self,
        program: Program,
        build: Callable[[Plan], Program],
        levels: int,
        plan_of: Callable[[int], Plan],
        context: Context,
    ) -> Plan:
        """Return the first plan of rising levels that saves what is asked for."""
        before = cost(program).flops
        target = before * (1 - self.fewer_flops)
        known = {0: before}

        def flops(level: int) -> int:
            if level not in known:
                context.progress("solving the schedule", len(known), 12)
                known[level] = cost(build(plan_of(level))).flops
            return known[level]

        if flops(levels) > target:
            saved = 1 - flops(levels) / before
            raise PassError(
                f"The pass {self.name} cannot save {self.fewer_flops:.0%} of the floating-point operations of "
                f"{program.name}: with as many tokens leaving as can, it saves {saved:.1%}. Ask for less, or let "
                f"tokens leave behind more or earlier layers."
            )
        few, enough = 0, levels
        while enough - few > 1:
            share = (flops(few) - target) / max(flops(few) - flops(enough), 1)
            # between the two by the straight line, but never so near to an end that the other stays where it is
            margin = (enough - few) // 8
            guess = min(max(few + round(share * (enough - few)), few + 1 + margin), enough - 1 - margin)
            few, enough = (few, guess) if flops(guess) <= target else (guess, enough)
        return plan_of(enough)


def _describe(stream: TokenStream, plan: Plan) -> str:
    leaving = ", ".join(map(str, plan.values()))
    return f"of {stream.length} tokens, {sum(plan.values())} leave ({leaving} behind the layers in turn)"
