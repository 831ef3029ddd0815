"""Owns the process in which one candidate of a benchmark lives: loads, checks parity, runs rounds on demand.

Spoken to in JSON lines by `measure.contest`. Standard output is the channel; what libraries print there goes
to standard error instead.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from xformopt.errors import MeasurementError, XformoptError
from xformopt.measure.fidelity import compare_outputs, default_tolerance
from xformopt.measure.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes
from xformopt.measure.runner import Array, DistantRunner, OpenRunner, Runner
from xformopt.measure.timing import time_round, warm_up

__all__ = ["Worker", "main"]

# imported before the clock of `load_ms` starts: loading a toolchain is not loading a model
_TOOLCHAINS = {
    "eager": "torch",
    "inductor": "torch",
    "ort": "onnxruntime",
    "openvino": "openvino",
    "tvm": "tvm",
    "triton": "torch",
}


class Worker:
    """One candidate and the answers to each command about it."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._inputs: dict[str, Array] = {}
        self._peak_bytes = 0

    def answer(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Do what one command asks and return the answer as JSON values."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "warm_up": self.warm_up,
            "round": self.round,
            "memory": self.memory,
            "profile": self.profile,
            "peaks": self.peaks,
        }
        return actions[command](**arguments)

    def open(
        self,
        *,
        opener: str,
        target: str,
        path: str,
        threads: int,
        inputs: str,
        reference: str | None,
        valid: str | None,
        save_outputs: str | None,
        max_relative_l2: float | None,
        precision: str | None,
    ) -> dict[str, Any]:
        """Load the candidate, run it once, and compare what it computed with the reference."""
        open_runner = _find(opener)
        self._inputs = _read_arrays(inputs)
        _import_toolchain(target)
        reset_peak_memory()
        base_bytes = resident_memory_bytes()
        start = time.perf_counter()
        runner = self._runner = open_runner(target, Path(path), threads=threads)
        load_ms = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        outputs = runner.run(self._inputs)
        first_run_ms = (time.perf_counter() - start) * 1e3
        self._peak_bytes = peak_memory_bytes()
        if save_outputs:
            np.savez(save_outputs, **outputs)  # type: ignore[arg-type]
        precision = precision or runner.precision
        limit = default_tolerance(precision) if max_relative_l2 is None else max_relative_l2
        fidelity = _checked(outputs, reference, valid, limit)
        # what the comparison held is not the candidate's
        reset_peak_memory()
        return {
            "load_ms": load_ms,
            "first_run_ms": first_run_ms,
            "base_memory_bytes": None if isinstance(runner, DistantRunner) else base_bytes,
            "fidelity": fidelity,
            "size_bytes": runner.size_bytes,
            "precision": precision,
            "fallbacks": list(runner.fallbacks),
        }

    def warm_up(self, *, seconds: float) -> dict[str, Any]:
        """Run for `seconds` and tell how long a run takes."""
        return {"run_ms": warm_up(self._run, seconds)}

    def round(self, *, min_seconds: float) -> dict[str, Any]:
        """Time one round."""
        if isinstance(self._runner, DistantRunner):
            return {"samples_ms": self._runner.time_round(self._inputs, min_seconds)}
        return {"samples_ms": time_round(self._run, min_seconds)}

    def memory(self) -> dict[str, Any]:
        """Tell the highest memory while loading and while running; None where it is another machine's."""
        if isinstance(self._runner, DistantRunner):
            return {"peak_memory_bytes": None}
        return {"peak_memory_bytes": max(self._peak_bytes, peak_memory_bytes())}

    def profile(self, *, rounds: int) -> dict[str, Any]:
        """Tell the kernel time of every node over `rounds` runs, or None."""
        assert self._runner is not None
        nodes = self._runner.profile(self._inputs, rounds)
        return {"nodes": None if nodes is None else [asdict(node) for node in nodes]}

    def peaks(self, *, threads: int) -> dict[str, Any]:
        """Measure the machine instead of a candidate."""
        from xformopt.measure.machine import measure_peaks

        return {"peaks": asdict(measure_peaks(threads))}

    def _run(self) -> object:
        assert self._runner is not None
        return self._runner.run(self._inputs)


def _checked(
    outputs: Mapping[str, Array], reference: str | None, valid: str | None, limit: float
) -> dict[str, float | None] | None:
    """Return the fidelity to the arrays stored at `reference`, or None without them."""
    if reference is None:
        return None
    fidelity = compare_outputs(outputs, _read_arrays(reference), _read_arrays(valid) if valid else {})
    if not fidelity.relative_l2 <= limit:
        raise MeasurementError(
            f"parity failed: the outputs differ from the reference by {fidelity.relative_l2:.3g} in relative "
            f"L2, and at most {limit:.3g} is allowed, so no time of this run is believed."
        )
    return asdict(fidelity)


def _import_toolchain(target: str) -> None:
    name = _TOOLCHAINS.get(target.split("-")[0])
    # one that is missing is for the opener to report
    with contextlib.suppress(ImportError):
        if name:
            importlib.import_module(name)


def _find(opener: str) -> OpenRunner:
    module, _, name = opener.partition(":")
    found: OpenRunner = getattr(importlib.import_module(module), name)
    return found


def _read_arrays(path: str) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _claim_standard_output() -> TextIO:
    """Return the channel to the parent, and send what anything else prints to standard error."""
    sys.stdout.flush()
    channel = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding="utf-8", line_buffering=True)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return channel


def main() -> None:
    """Answer commands until standard input ends."""
    channel = _claim_standard_output()
    # an interrupt is the parent's to handle: it closes standard input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # one, but where candidates share a connection: there each command names its own
    workers: defaultdict[str, Worker] = defaultdict(Worker)
    for line in sys.stdin:
        command = json.loads(line)
        for folder in command.pop("sys_path", ()):
            if folder not in sys.path:
                sys.path.append(folder)
        try:
            answer = workers[command.pop("run", "")].answer(**command)
        except XformoptError as error:
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
