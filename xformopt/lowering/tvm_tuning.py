"""Which tiles TVM's kernels take on this machine: each function alone, timed against the tiles kept until then.

The answers are kept in one file of the cache folder, by function and its sizes, for one machine and one version.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xformopt.kernels.tvm_form import Tile, Trial
from xformopt.lowering.manifest import TuningRecord
from xformopt.lowering.tuning_cache import TileCache
from xformopt.measure.machine import describe_machine

__all__ = ["CACHE_FILE", "Tiling", "choose_tiles"]

Progress = Callable[[str, int, int], None]

# raised with what kernels compute, so that answers for others are not taken
_VERSION = 1
CACHE_FILE = "tvm-tiles.json"
# a tile must beat the one kept until then by this much
_WORTH = 0.98
_FEW_ROUNDS, _ROUNDS = 3, 11
# a measurement lasts at least this long: a call of microseconds is repeated
_SHORTEST = 0.002
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Tiling:
    """The tiles to use by function, and how they were found."""

    tiles: dict[str, Tile]
    records: tuple[TuningRecord, ...] = ()


def choose_tiles(
    trials: Mapping[str, Trial],
    build: Callable[[Any], Callable[..., None]],
    *,
    threads: int,
    seconds: float,
    progress: Progress,
) -> Tiling:
    """Return the fastest tile of every function on this machine.

    Args:
        trials: The functions by name, which states their sizes.
        build: Compiles a function for this machine.
        threads: Threads to choose for; with one, processor time is compared, which other processes do not disturb.
        seconds: When to stop; what was not timed by then keeps its default, and is timed the next time.
        progress: Called with (what, done, total).

    """
    # read when the first parallel loop makes the pool
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    cache = _cache()
    known, ignored = cache.read()
    records = [TuningRecord(operator="tvm", form="tuning cache", note=ignored)] if ignored else []
    search = _Search(build, time.process_time if threads == 1 else time.perf_counter, time.monotonic() + seconds)
    open_trials = {name: trial for name, trial in trials.items() if _key(name, threads) not in known}
    for done, (name, trial) in enumerate(open_trials.items()):
        progress(f"timing tiles of {name}", done, len(open_trials))
        best, record, is_whole = search.run(name, trial)
        records.append(record)
        if is_whole:
            known[_key(name, threads)] = best
            cache.write(known)
        elif best != trial.default:
            known[_key(name, threads)] = best
    progress("timing tiles", len(open_trials), len(open_trials))
    found = {name: known[key] for name in trials if (key := _key(name, threads)) in known}
    return Tiling(found, tuple(records))


@dataclass(frozen=True)
class _Search:
    build: Callable[[Any], Callable[..., None]]
    clock: Callable[[], float]
    deadline: float

    def run(self, name: str, trial: Trial) -> tuple[Tile, TuningRecord, bool]:
        """Return the best tile of one function, what is to be said of it, and whether all were timed."""
        operator, start = name.partition("_")[0], trial.default
        if time.monotonic() > self.deadline:
            return start, TuningRecord(operator=operator, form=name, note="not timed: out of time"), False
        best, kept = start, self._open(trial.make(start))
        ratio, gap, timed = 1.0, 0.0, 0
        for tile in trial.tiles:
            if time.monotonic() > self.deadline:
                break
            timed += 1
            rival = self._open(trial.make(tile))
            gap = max(gap, distance := rival.distance(kept))
            if not distance <= _TOLERANCE:
                continue
            found = self._compare(kept, rival)
            if found < _WORTH:
                best, kept, ratio = tile, rival, ratio * found
        note = f"{best.rows}x{best.columns} of {timed} tiles timed, of {len(trial.tiles)}"
        record = TuningRecord(
            operator=operator, form=name, ratio=round(ratio, 4), relative_l2=gap, kept=best != start, note=note
        )
        return best, record, timed == len(trial.tiles)

    def _open(self, function: Any) -> _Candidate:
        return _Candidate(self.build(function), _operands(function))

    def _compare(self, best: _Candidate, rival: _Candidate) -> float:
        """Return the rival's time over the best's, the median of rounds; few of them where it is not faster."""
        ratios: list[float] = []
        repeats = max(1, round(_SHORTEST / max(self._time(best, 1), 1e-6)))
        while len(ratios) < _ROUNDS and (len(ratios) < _FEW_ROUNDS or np.median(ratios) < 1):
            order = (best, rival) if len(ratios) % 2 else (rival, best)
            taken = {id(candidate): self._time(candidate, repeats) for candidate in order}
            ratios.append(taken[id(rival)] / max(taken[id(best)], 1e-9))
        return float(np.median(ratios))

    def _time(self, candidate: _Candidate, repeats: int) -> float:
        candidate.call()
        start = self.clock()
        for _ in range(repeats):
            candidate.call()
        return self.clock() - start


@dataclass(frozen=True)
class _Candidate:
    """A compiled function and its operands; the last one is the result."""

    function: Callable[..., None]
    operands: tuple[Any, ...]

    def call(self) -> None:
        self.function(*self.operands)

    def distance(self, other: _Candidate) -> float:
        """Return the relative L2 of the results."""
        for candidate in (self, other):
            candidate.call()
        mine, theirs = self.operands[-1].numpy(), other.operands[-1].numpy()
        return float(np.linalg.norm(mine - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))


def _operands(function: Any) -> tuple[Any, ...]:
    """Return arrays for the operands of a function.

    Numbers for floats; ones for what is not, for scales, and for panels of weights (``w...``), laid out for the tile.
    """
    import tvm

    generator, made = np.random.default_rng(0), []
    array: np.ndarray
    for buffer in function.params:
        shape = [int(size) for size in buffer.shape]
        dtype = str(buffer.dtype)
        if dtype != "float32" or not shape or str(buffer.name).startswith("w"):
            array = np.ones(shape, dtype)
        else:
            array = generator.standard_normal(shape, np.float32)
        made.append(tvm.runtime.tensor(array))
    return tuple(made)


def _key(name: str, threads: int) -> str:
    return f"{name} on {threads} threads"


def _cache() -> TileCache[Tile]:
    machine = describe_machine()
    made_for = {
        "version": _VERSION,
        "cpu": machine.cpu,
        "isa": list(machine.isa),
        "cores": machine.cores,
        "tvm": machine.packages.get("apache-tvm"),
    }
    return TileCache(CACHE_FILE, Tile, made_for)
