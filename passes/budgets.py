"""What a pass may be told to save: FLOPs, parameters, or time on the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

from xformopt.analysis import cost
from xformopt.errors import PassError
from xformopt.pipeline import Context
from xformopt.program import Program

__all__ = ["Budget", "meet_latency", "used"]

# what is counted: FLOPs at the example shape, elements of parameters, or seconds on the target
Budget: TypeAlias = Literal["flops", "parameters", "latency"]

# measurements of a latency budget: each halves the interval of the share to remove
_MEASUREMENTS = 6

Plan = TypeVar("Plan")


def used(program: Program, budget: Budget) -> int:
    """Return what the program uses of a budget; of latency, which must be measured, its FLOPs."""
    found = cost(program)
    return found.parameters if budget == "parameters" else found.flops


def meet_latency(
    program: Program,
    share: float,
    context: Context,
    choose: Callable[[float], Plan],
    carry_out: Callable[[Plan], Program],
    limit: str,
    advice: str,
) -> Plan:
    """Bisect how much to remove on the time that is measured; a speed-up counts in the middle of its interval.

    Args:
        program: What is to be faster.
        share: Of its time, what is to go.
        context: Of the pass; measures.
        choose: Returns what to remove, given a number between 0 and 1, at which all goes that may.
        carry_out: Returns the program without it.
        limit: What is left at 1, in words for the message.
        advice: What to do where that is too slow, a sentence.

    Raises:
        PassError: nobody measures, or the budget cannot be met; the message has the best that was reached.

    """
    if context.measure is None:
        raise PassError(
            "A latency budget is met by measuring on the target, and this run times nothing. Leave --no-bench away (or "
            "give measure=... in Python), or set budget=flops."
        )
    wanted, low, high = 1 / (1 - share), 0.0, 1.0
    best: Plan | None = None
    fastest = 0.0
    # first everything that may go: if that is too slow, nothing is fast enough
    tried = high
    for attempt in range(_MEASUREMENTS):
        context.progress("measuring candidates", attempt, _MEASUREMENTS)
        plan = choose(tried)
        speedup = sum(context.measure(program, carry_out(plan))) / 2
        fastest = max(fastest, speedup)
        if speedup >= wanted:
            best, high = plan, tried
        else:
            low = tried
        if best is None:
            break
        tried = (low + high) / 2
    if best is None:
        raise PassError(
            f"The budget cannot be met: {share:.0%} of the time on {context.target} is to go, and with {limit} "
            f"{1 - 1 / fastest:.1%} does. {advice}"
        )
    return best
