"""Timing, memory, the machine, the child process and fidelity."""

from __future__ import annotations

import gc
import getpass
import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from xformopt.errors import MeasurementError
from xformopt.measure.child import Child
from xformopt.measure.fidelity import compare_outputs, default_tolerance
from xformopt.measure.machine import describe_machine, measure_peaks
from xformopt.measure.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes
from xformopt.measure.timing import time_interleaved, time_round


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_interleaved(calls, warmup_seconds=0.0, rounds=3, min_seconds=0.0, max_repetitions=1)
    # two calls to warm each up; a call that fills its round by itself is its only sample
    assert order == list("aabbcc" + "abc" * 3)
    assert [len(samples[name].rounds) for name in "abc"] == [3, 3, 3]
    assert samples["a"].median_ms >= 0.0
    assert gc.isenabled()


def test_a_round_has_at_most_so_many_repetitions_and_does_not_count_the_first() -> None:
    calls: list[int] = []
    assert len(time_round(lambda: calls.append(1), min_seconds=5.0, max_repetitions=7)) == 7
    assert len(calls) == 8


def test_a_candidate_that_raises_is_named() -> None:
    def broken() -> None:
        raise ValueError("no kernel")

    with pytest.raises(MeasurementError, match=r'"broken" failed.*no kernel'):
        time_interleaved({"broken": broken})
    assert gc.isenabled()


@pytest.mark.parametrize(("candidates", "rounds"), [({}, 3), ({"a": int}, 0)])
def test_nothing_to_time(candidates: dict[str, type], rounds: int) -> None:
    with pytest.raises(MeasurementError, match="nothing to time"):
        time_interleaved(candidates, rounds=rounds)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_seen_and_reset() -> None:
    before = resident_memory_bytes()
    # mapped by itself and written in small pieces: what is freed inside the heap need not go back to the system
    piece = b"x" * 1_000_000
    with mmap.mmap(-1, 128 * len(piece)) as block:
        for _ in range(128):
            block.write(piece)
    assert peak_memory_bytes() >= before + 100e6
    if reset_peak_memory():
        assert peak_memory_bytes() < before + 100e6


def test_a_machine_is_described_without_its_owner() -> None:
    machine = describe_machine().to_dict()
    text = str(machine)
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 1e8
    assert machine["packages"]["numpy"] == np.__version__
    for private in (platform.node(), getpass.getuser(), str(Path.home())):
        assert len(private) < 5 or private not in text


def test_peaks_are_measured_and_the_threads_put_back() -> None:
    import torch

    before = torch.get_num_threads()
    peaks = measure_peaks(1, seconds=0.05)
    assert peaks.threads == 1
    assert peaks.gflops > 0.1
    assert peaks.gbytes_s > 0.1
    assert torch.get_num_threads() == before


CHILD = """
import json, sys, time
for line in sys.stdin:
    command = json.loads(line)["command"]
    if command == "hang":
        time.sleep(60)
    if command == "die":
        sys.exit("out of ideas")
    print(json.dumps({"error": "told so"} if command == "fail" else {"pong": 1}), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path):
    (tmp_path / "answering.py").write_text(CHILD)
    child = Child("answering", {"PYTHONPATH": str(tmp_path)})
    yield child
    child.close()


def test_a_child_answers(child: Child) -> None:
    assert child.ask("ping", timeout=60) == {"pong": 1}
    with pytest.raises(MeasurementError, match="told so"):
        child.ask("fail", timeout=60)


def test_a_child_that_hangs_is_stopped(child: Child) -> None:
    child.ask("ping", timeout=60)
    with pytest.raises(MeasurementError, match=r'no answer to "hang" in 0.2 s'):
        child.ask("hang", timeout=0.2)


def test_a_child_that_dies_leaves_its_last_words(child: Child) -> None:
    with pytest.raises(MeasurementError, match=r"exit status 1.*out of ideas"):
        child.ask("die", timeout=60)
    with pytest.raises(MeasurementError, match="exit status 1"):
        child.ask("ping", timeout=60)


REFERENCE = {"y": np.array([[3.0, 4.0], [0.0, 5.0]], dtype=np.float32)}


def test_fidelity_by_hand() -> None:
    found = compare_outputs({"y": np.array([[4.0, 3.0], [0.0, 5.0]])}, REFERENCE)
    assert found.relative_l2 == pytest.approx(np.sqrt(2 / 50))
    assert found.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert found.top1_agreement == 0.5


def test_the_worst_output_counts() -> None:
    reference = {"a": np.ones((2, 3)), "b": np.ones((2, 3))}
    found = compare_outputs({"a": np.ones((2, 3)), "b": np.full((2, 3), 1.5)}, reference)
    assert found.relative_l2 == pytest.approx(0.5)


def test_outputs_of_other_names_are_paired_in_order() -> None:
    assert compare_outputs({"output_0": REFERENCE["y"]}, REFERENCE).relative_l2 == 0.0


def test_zero_vectors_agree_and_a_zero_reference_is_missed_infinitely() -> None:
    zeros = {"y": np.zeros((2, 2))}
    assert compare_outputs(zeros, zeros).cosine == 1.0
    assert compare_outputs({"y": np.ones((2, 2))}, zeros).relative_l2 == float("inf")


def test_infinities_of_the_reference_must_be_met() -> None:
    masked = {"y": np.array([[1.0, -np.inf]])}
    assert compare_outputs(masked, masked).relative_l2 == 0.0
    with pytest.raises(MeasurementError, match="not finite"):
        compare_outputs({"y": np.array([[1.0, 2.0]])}, masked)


@pytest.mark.parametrize(
    ("outputs", "valid", "reason"),
    [
        ({"y": np.ones((2, 3))}, None, "has the shape"),
        ({"y": np.full((2, 2), np.nan)}, None, "not finite in 4 of 4"),
        ({"a": np.ones(2), "b": np.ones(2)}, None, "must have the same names"),
        ({"y": np.ones((2, 2))}, {"y": np.ones(3, bool)}, "valid positions"),
    ],
)
def test_what_cannot_be_compared(
    outputs: dict[str, np.ndarray], valid: dict[str, np.ndarray] | None, reason: str
) -> None:
    with pytest.raises(MeasurementError, match=reason):
        compare_outputs(outputs, REFERENCE, valid)


def test_exact_precisions_are_held_to_more() -> None:
    assert default_tolerance("fp32") < default_tolerance("fp16") < default_tolerance("int8") < 1
