"""The orchestration, against runners that are fast, wrong, noisy, silent or dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.errors import UsageError
from xformopt.measure.child import Child
from xformopt.measure.machine import Peaks

RUNNERS = """
import os, sys, time
import numpy as np
from xformopt.errors import LoweringError
from xformopt.measure.runner import OperatorTime


class Fake:
    input_names, output_names = ("x",), ("y",)
    size_bytes, precision, fallbacks = 123, "fp32", ["Gather runs on the host"]

    def __init__(self, target):
        self.target, self.kind, self.runs = target, target, 0

    def run(self, inputs):
        self.runs += 1
        print("a library prints")
        os.write(1, b"and a runtime writes\\n")
        if self.kind == "slow":
            time.sleep(0.004)
        if self.kind == "hangs-later" and self.runs > 4:
            time.sleep(60)
        if self.kind == "dies-later" and self.runs > 4:
            sys.stderr.write("the kernel gave up\\n")
            sys.stderr.flush()
            os._exit(7)
        y = inputs["x"] * 2
        if self.kind == "wrong":
            y = y + 1
        if self.kind == "near":
            y = y * np.float32(1.01)
        if self.kind == "nan":
            y = y * np.nan
        return {"y": y}

    def profile(self, inputs, rounds):
        if self.kind == "no-profile":
            raise RuntimeError("the profiler is broken")
        if self.kind == "eager":
            return None
        return [OperatorTime("a", "MatMul", 2 * rounds, rounds),
                OperatorTime("b", "MatMul", rounds, rounds),
                OperatorTime("c", "Add", rounds, rounds)]


def open_runner(target, path, *, threads, profile_to=None):
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    if target == "dead":
        os.kill(os.getpid(), 9)
    if target == "refused":
        raise LoweringError("the target cannot express it")
    return Fake(target)
"""

X = {"x": np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)}
Y = {"y": X["x"] * 2}
SETTINGS = BenchSettings(
    threads=1,
    rounds=4,
    warmup_seconds=0.0,
    round_seconds=0.002,
    profile_rounds=5,
    open_runner="fake_runners:open_runner",
)


@pytest.fixture(autouse=True)
def _fake_runners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_runners.py").write_text(RUNNERS)
    monkeypatch.syspath_prepend(str(tmp_path))


def candidates(*targets: str) -> list[Candidate]:
    return [Candidate(target, target, Path("model"), flops=2e6, bytes_moved=1e5) for target in targets]


def bench(*targets: str, reference: dict[str, np.ndarray] | None = Y, **changes: object):
    settings = BenchSettings(**{**SETTINGS.__dict__, **changes})
    return run_bench(candidates(*targets), X, reference, settings=settings, peaks=Peaks(1, 100.0, 10.0))


def test_every_contract_key_is_present_and_filled() -> None:
    report = bench("eager", "fast", "slow").to_dict()
    assert report["schema"] == "xformopt/bench/1"
    assert report["machine"]["cores"] >= 1
    eager, fast, _ = report["runs"]
    wanted = {
        *("name", "target", "batch", "length", "latency_ms", "load_ms", "peak_memory_bytes", "size_bytes"),
        *(
            "fidelity",
            "speedup",
            "threads",
            "precision",
            "samples_ms",
            "operators",
            "roofline",
            "fallbacks",
            "error",
        ),
    }
    assert wanted <= set(eager)
    assert wanted <= set(fast)
    assert set(fast["latency_ms"]) == {"p50", "p90", "p99", "ci95"}
    assert fast["fidelity"] == {"relative_l2": 0.0, "cosine": pytest.approx(1.0), "top1_agreement": 1.0}
    assert fast["speedup"]["over"] == "eager"
    assert eager["speedup"] is None
    assert fast["batch"] == 3
    assert fast["length"] is None
    assert fast["size_bytes"] == 123
    assert eager["operators"] is None
    assert fast["peak_memory_bytes"] > 1e6
    assert fast["operators"][0] == {"name": "MatMul", "ms": 3.0, "share": 0.75, "count": 2}
    assert fast["roofline"]["intensity"] == 20.0
    assert fast["roofline"]["bound"] == "compute"
    assert fast["fallbacks"] == ["Gather runs on the host"]
    assert len(fast["samples_ms"]) >= 4
    assert fast["error"] is None


def test_a_slower_run_has_a_ratio_below_one() -> None:
    speedup = bench("fast", "slow").runs[1].speedup
    assert speedup is not None
    assert speedup.ratio < 1
    assert speedup.is_difference


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("wrong", "parity failed"),
        ("near", "parity failed"),
        ("nan", "not finite"),
        ("dead", "died of signal 9"),
        ("refused", "cannot express"),
        ("dies-later", "exit status 7.*the kernel gave up"),
    ],
)
def test_a_run_that_fails_has_an_error_and_no_times_and_the_others_go_on(target: str, reason: str) -> None:
    failed, fine = bench(target, "fast", over="fast").runs
    assert failed.error is not None
    assert pytest.raises(AssertionError, match=reason).matches(AssertionError(failed.error))
    assert failed.latency_ms is failed.samples_ms is failed.speedup is failed.operators is None
    assert fine.error is None
    assert fine.latency_ms is not None


def test_a_run_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Child.ask

    def impatient(child: Child, command: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        return ask(child, command, timeout=0.5 if command == "round" else timeout, **arguments)

    monkeypatch.setattr(Child, "ask", impatient)
    failed, fine = bench("hangs-later", "fast", over="fast").runs
    assert failed.error is not None
    assert "gave no answer" in failed.error
    assert fine.latency_ms is not None


def test_no_speed_up_over_a_run_that_failed() -> None:
    assert bench("dead", "fast").runs[1].speedup is None


def test_a_lossy_candidate_may_state_its_own_limit() -> None:
    near = Candidate("near", "near", Path("model"), max_relative_l2=0.1)
    run = run_bench([near], X, Y, settings=SETTINGS, peaks=Peaks(1, 1.0, 1.0)).runs[0]
    assert run.error is None
    assert run.fidelity is not None
    assert run.fidelity.relative_l2 == pytest.approx(0.01, rel=1e-3)


def test_without_a_reference_the_run_compared_with_is_it() -> None:
    report = bench("wrong", "fast", reference=None, over="fast")
    assert report.runs[0].error is not None
    assert report.runs[1].fidelity is None
    assert report.protocol["reference"] == "fast"


def test_padding_does_not_count() -> None:
    spoiled = {"y": Y["y"].copy()}
    spoiled["y"][2] = 100.0
    valid = {"y": np.array([True, True, False])}
    run = run_bench(candidates("fast"), X, spoiled, valid=valid, settings=SETTINGS, peaks=Peaks(1, 1.0, 1.0)).runs[0]
    assert run.error is None
    assert run.fidelity is not None
    assert run.fidelity.relative_l2 == 0.0


def test_a_profile_that_fails_costs_a_note() -> None:
    run = bench("no-profile").runs[0]
    assert run.latency_ms is not None
    assert run.operators is None
    assert "the profiler is broken" in run.notes[0]


def test_the_rounds_are_interleaved_and_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    run_bench(
        candidates("slow", "fast"),
        X,
        Y,
        settings=SETTINGS,
        peaks=Peaks(1, 1.0, 1.0),
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert seen[0] == ("loading", 0, 2)
    assert ("measuring", 4, 4) in seen
    assert seen[-1][0] == "profiling"


@pytest.mark.parametrize(
    ("targets", "changes", "reason"),
    [
        ((), {}, "at least one candidate"),
        (("a", "a"), {}, "two candidates are named a"),
        (("a",), {"over": "b"}, 'no run "b"'),
        (("a",), {"rounds": 0}, "--rounds is 0"),
        (("a",), {"threads": -1}, "--threads is -1"),
    ],
)
def test_wrong_usage(targets: tuple[str, ...], changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        bench(*targets, **changes)
