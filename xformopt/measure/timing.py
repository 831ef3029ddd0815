"""Owns how a callable is timed: warmed up, in rounds, interleaved with its rivals."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from xformopt.errors import MeasurementError

__all__ = ["Samples", "time_interleaved", "time_round", "warm_up"]

# beyond this a round of a very fast call adds data, not knowledge
MAX_REPETITIONS = 200


@dataclass(frozen=True)
class Samples:
    """The times of one candidate in milliseconds, one tuple per round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def all_ms(self) -> tuple[float, ...]:
        """Every sample in the order it was taken."""
        return tuple(sample for samples in self.rounds for sample in samples)

    @property
    def median_ms(self) -> float:
        """Median over every sample."""
        return float(np.median(self.all_ms))


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    warmup_seconds: float = 0.1,
    rounds: int = 10,
    min_seconds: float = 0.03,
    max_repetitions: int = MAX_REPETITIONS,
) -> dict[str, Samples]:
    """Time callables against each other in this process, rounds interleaved: A B C A B C.

    Interleaving spreads a slow phase of the machine over all candidates instead of charging it to one.

    Args:
        candidates: What to time, by name; each callable takes no argument and returns when its work is done.
        warmup_seconds: How long each candidate runs before the first round (at least two calls).
        rounds: How many rounds each candidate gets.
        min_seconds: How long a round of one candidate lasts at least (at least one call).
        max_repetitions: How many calls a round has at most, whatever its length.

    Returns:
        The samples of each candidate, in the order given.

    Raises:
        MeasurementError: There is nothing to time, `rounds` is below 1, or a candidate raised.

    """
    if not candidates or rounds < 1:
        raise MeasurementError(
            f"nothing to time: {len(candidates)} candidates in {rounds} rounds. Give at least one of each."
        )
    for name, call in candidates.items():
        with _blamed_on(name):
            warm_up(call, warmup_seconds)
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            with _blamed_on(name):
                taken[name].append(tuple(time_round(call, min_seconds, max_repetitions)))
    return {name: Samples(tuple(samples)) for name, samples in taken.items()}


def warm_up(call: Callable[[], object], seconds: float) -> float:
    """Call until `seconds` have passed, twice at least, and return the fastest call in milliseconds."""
    deadline = time.perf_counter() + seconds
    fastest = min(_timed_ms(call), _timed_ms(call))
    while time.perf_counter() < deadline:
        fastest = min(fastest, _timed_ms(call))
    return fastest


def time_round(call: Callable[[], object], min_seconds: float, max_repetitions: int = MAX_REPETITIONS) -> list[float]:
    """Time one round: calls until `min_seconds` have passed, each a sample in milliseconds.

    The first call refills the caches that a rival's round emptied, so it is not counted, unless one call
    fills the round by itself: there the refill is lost in the noise, and a second call would double the cost.
    """
    with _no_garbage_collection():
        settling = _timed_ms(call)
        if settling >= min_seconds * 1e3:
            return [settling]
        samples = [_timed_ms(call)]
        deadline = time.perf_counter() + min_seconds - samples[0] / 1e3
        while time.perf_counter() < deadline and len(samples) < max_repetitions:
            samples.append(_timed_ms(call))
    return samples


def _timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise MeasurementError(
            f'the candidate "{name}" failed while it was timed: {type(error).__name__}: {error}'
        ) from error
