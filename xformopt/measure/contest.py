"""Owns the phases of a benchmark: candidates opened in processes of their own, timed in interleaved rounds.

Needs numpy alone, so that a bundle can carry it to machines that have no xformopt.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xformopt.errors import MeasurementError, UsageError
from xformopt.measure.child import Answering, Child
from xformopt.measure.machine import Peaks
from xformopt.measure.runner import Array, OperatorTime

__all__ = ["BenchSettings", "Candidate", "Contest", "Entry", "Progress"]

# stage, rounds or candidates done, of how many
Progress = Callable[[str, int, int], None]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# idle threads of a runtime spin for a moment after its last run, and would take a core from the next one
_PAUSE_SECONDS = 0.005
_FEWEST_ROUNDS, _MOST_ROUNDS = 10, 60
_NOTHING = "a benchmark needs at least one candidate and at least one input array."


@dataclass(frozen=True)
class Candidate:
    """One system to measure.

    Args:
        name: Unique in the comparison.
        target: As `xformopt targets` lists them.
        path: What the target opens: an artifact, a saved program, an ONNX file.
        precision: Of the arithmetic; None asks the runner.
        flops: Operations of one run (a multiply-add is two), for the roofline.
        bytes_moved: Bytes that one run must read and write at least, for the roofline.
        max_relative_l2: Beyond this distance from the reference the run has failed parity. None takes the
            default of its precision, which is meant for exact passes; a lossy recipe states its own.

    """

    name: str
    target: str
    path: Path
    precision: str | None = None
    flops: float | None = None
    bytes_moved: float | None = None
    max_relative_l2: float | None = None


@dataclass(frozen=True)
class BenchSettings:
    """How to measure; the defaults take a few seconds per candidate.

    Args:
        threads: For every candidate; None takes the cores this process may use.
        rounds: None chooses 10 to 60 so that each candidate gets about `budget_seconds`.
        budget_seconds: See `rounds`.
        warmup_seconds: Each candidate runs this long before the first round.
        round_seconds: A round of one candidate lasts this long at least, or one run.
        profile_rounds: Runs of the per-operator profile, taken last; 0 takes none.
        timeout_seconds: How long a candidate may take over any one step.
        over: The name of the run that speed-ups are over; None takes that of target "eager", else the first.
        batch: For the record; None reads it off the inputs, like `length`.
        length: For the record.
        open_runner: What opens a candidate, as `module:function`.
        worker: The module that each candidate's process runs.
        seed: Of the bootstrap.

    """

    threads: int | None = None
    rounds: int | None = None
    budget_seconds: float = 4.0
    warmup_seconds: float = 0.3
    round_seconds: float = 0.03
    profile_rounds: int = 10
    timeout_seconds: float = 600.0
    over: str | None = None
    batch: int | None = None
    length: int | None = None
    open_runner: str = "xformopt.lowering:open_runner"
    worker: str = "xformopt.benchmark_worker"
    seed: int = 0


@dataclass
class Entry:
    """A candidate and what is known of it so far."""

    candidate: Candidate
    child: Answering | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    run_ms: float = 0.0
    rounds: list[list[float]] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    profiled: list[OperatorTime] | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    # why the rounds ended before the last one, where what was measured until then is kept
    stopped: str | None = None


class Contest:
    """The processes of a benchmark and its phases in order: load, measure, profile.

    Raises:
        UsageError: No candidates, two of one name, `over` names none, or a setting is senseless.

    """

    def __init__(self, candidates: Sequence[Candidate], settings: BenchSettings, progress: Progress) -> None:
        _check(candidates, settings)
        self.entries = [Entry(candidate) for candidate in candidates]
        self.baseline = self.entries[_baseline_index(candidates, settings)]
        self.settings = settings
        self.threads = settings.threads or _usable_cores()
        self.rounds = 0
        self.progress = progress

    def hold(
        self,
        inputs: Mapping[str, Array],
        reference: Mapping[str, Array] | None = None,
        valid: Mapping[str, Array] | None = None,
    ) -> None:
        """Go through all phases; a candidate that fails keeps its error, and the others go on."""
        if not inputs:
            raise UsageError(_NOTHING)
        with tempfile.TemporaryDirectory(prefix="xformopt-bench-") as folder, self._children_closed():
            self._load(Path(folder), inputs, reference, valid)
            self._measure()
            self._profile()

    @property
    def alive(self) -> list[Entry]:
        """The candidates that go on."""
        return [entry for entry in self.entries if entry.error is None and entry.stopped is None]

    @contextmanager
    def _children_closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            for entry in self.entries:
                if entry.child is not None:
                    entry.child.close()

    def measure_peaks(self) -> Peaks | None:
        """Measure the machine in a process that is gone before a candidate runs."""
        self.progress("measuring the machine", 0, 1)
        child = self._spawn()
        try:
            answer = child.ask("peaks", timeout=self.settings.timeout_seconds, threads=self.threads)
        except MeasurementError:
            return None
        finally:
            child.close()
        return Peaks(**answer["peaks"])

    def _load(
        self,
        folder: Path,
        inputs: Mapping[str, Array],
        reference: Mapping[str, Array] | None,
        valid: Mapping[str, Array] | None,
    ) -> None:
        """Open the candidates, check parity; the run compared with goes first: it may be the reference."""
        arrays = {"inputs": inputs, "reference": reference, "valid": valid}
        paths = {name: folder / f"{name}.npz" for name in arrays}
        for name, values in arrays.items():
            if values:
                np.savez(paths[name], **values)  # type: ignore[arg-type]
        order = [self.baseline, *(entry for entry in self.entries if entry is not self.baseline)]
        for done, entry in enumerate(order):
            self.progress("loading", done, len(order))
            with self._blamed_on(entry):
                entry.child = self._spawn()
                entry.opened = self._ask(
                    entry,
                    "open",
                    sys_path=sys.path,
                    opener=self.settings.open_runner,
                    target=entry.candidate.target,
                    path=str(entry.candidate.path),
                    threads=self.threads,
                    inputs=str(paths["inputs"]),
                    reference=str(paths["reference"]) if paths["reference"].exists() else None,
                    valid=str(paths["valid"]) if paths["valid"].exists() else None,
                    save_outputs=str(paths["reference"]) if reference is None and done == 0 else None,
                    max_relative_l2=entry.candidate.max_relative_l2,
                    precision=entry.candidate.precision,
                )
        self.progress("loading", len(order), len(order))

    def _measure(self) -> None:
        """Warm up, then run the rounds: A B C A B C."""
        for done, entry in enumerate(self.alive):
            self.progress("warming up", done, len(self.entries))
            with self._blamed_on(entry):
                answer = self._ask(entry, "warm_up", seconds=self.settings.warmup_seconds)
                entry.run_ms = answer["run_ms"]
        self.rounds = self.settings.rounds or self._affordable_rounds()
        for done in range(self.rounds):
            self.progress("measuring", done, self.rounds)
            for entry in self.alive:
                time.sleep(_PAUSE_SECONDS)
                with self._blamed_on(entry):
                    answer = self._ask(entry, "round", min_seconds=self.settings.round_seconds)
                    entry.rounds.append(answer["samples_ms"])
        for entry in self.alive:
            with self._blamed_on(entry):
                entry.peak_memory_bytes = self._ask(entry, "memory")["peak_memory_bytes"]
        self.progress("measuring", self.rounds, self.rounds)

    def _profile(self) -> None:
        """Take the per-operator profiles; one that fails costs a note, not the times."""
        alive = self.alive if self.settings.profile_rounds else []
        for done, entry in enumerate(alive):
            self.progress("profiling", done, len(alive))
            try:
                answer = self._ask(entry, "profile", rounds=self.settings.profile_rounds)
                if answer["nodes"] is not None:
                    entry.profiled = [OperatorTime(**node) for node in answer["nodes"]]
            except MeasurementError as error:
                entry.notes.append(f"no per-operator profile: {error}")

    def protocol(self, reference_given: bool) -> dict[str, Any]:
        """Say how it was measured, for the record."""
        return {
            "rounds": self.rounds,
            "round_seconds": self.settings.round_seconds,
            "warmup_seconds": self.settings.warmup_seconds,
            "threads": self.threads,
            "interleaved": True,
            "process_per_run": True,
            "reference": "given" if reference_given else self.baseline.candidate.name,
            "seed": self.settings.seed,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _affordable_rounds(self) -> int:
        round_ms = 1e3 * self.settings.round_seconds
        # a run shorter than a round is preceded by one that is not counted
        costs = [max(entry.run_ms, round_ms + min(entry.run_ms, round_ms)) for entry in self.alive]
        if not costs:
            return 0
        affordable = math.ceil(1e3 * self.settings.budget_seconds * len(costs) / sum(costs))
        return min(max(affordable, _FEWEST_ROUNDS), _MOST_ROUNDS)

    def _spawn(self) -> Answering:
        environment = {name: str(self.threads) for name in _THREAD_VARIABLES}
        return Child(self.settings.worker, environment)

    def _ask(self, entry: Entry, command: str, **arguments: Any) -> dict[str, Any]:
        assert entry.child is not None
        return entry.child.ask(command, timeout=self.settings.timeout_seconds, **arguments)

    @contextmanager
    def _blamed_on(self, entry: Entry) -> Iterator[None]:
        try:
            yield
        except (MeasurementError, OSError) as error:
            entry.error = str(error)
            if entry.child is not None:
                entry.child.close()


def _check(candidates: Sequence[Candidate], settings: BenchSettings) -> None:
    names = [candidate.name for candidate in candidates]
    if not names:
        raise UsageError(_NOTHING)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two candidates are named {', '.join(twice)}; give each a name of its own.")
    if settings.over is not None and settings.over not in names:
        raise UsageError(f'there is no run "{settings.over}" to compare with; there are {", ".join(names)}.')
    for name in ("threads", "rounds"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")


def _baseline_index(candidates: Sequence[Candidate], settings: BenchSettings) -> int:
    for index, candidate in enumerate(candidates):
        if candidate.name == settings.over or (settings.over is None and candidate.target == "eager"):
            return index
    return 0


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
