"""Owns the benchmark: a contest of candidates, and the report of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from xformopt.measure.contest import BenchSettings, Candidate, Contest, Progress
from xformopt.measure.machine import Machine, Peaks, describe_machine
from xformopt.measure.runner import Array
from xformopt.measure.summary import summarize
from xformopt.report.schema import BenchReport, MachineRecord, Run

__all__ = ["BenchSettings", "Candidate", "Progress", "run_bench"]


def run_bench(
    candidates: Sequence[Candidate],
    inputs: Mapping[str, Array],
    reference: Mapping[str, Array] | None = None,
    *,
    valid: Mapping[str, Array] | None = None,
    settings: BenchSettings | None = None,
    machine: Machine | None = None,
    peaks: Peaks | None = None,
    source: str | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure candidates against each other on the same inputs.

    A candidate that crashes, hangs or fails parity becomes a run with `error` and no times; the others go on.

    Args:
        candidates: What to measure, at least one.
        inputs: Arrays by input name.
        reference: What the original computes in eager fp32; None takes what the run compared with computes.
        valid: For each output with padding, a boolean array over its leading axes: the positions that count.
        settings: How to measure.
        machine: The description of this machine, where the caller has it.
        peaks: Its measured peaks; None measures them if a candidate states its FLOPs.
        source: What was optimized, for the report's headline.
        progress: Called with a stage, how much of it is done, and of how much.

    Raises:
        UsageError: No candidates or inputs, two of one name, `over` names none, or a setting is senseless.

    """
    contest = Contest(candidates, settings or BenchSettings(), progress or (lambda stage, done, total: None))
    machine = machine or describe_machine()
    if peaks is None and any(candidate.flops for candidate in candidates):
        peaks = contest.measure_peaks()
    contest.hold(inputs, reference, valid)
    runs = [Run.model_validate(values) for values in summarize(contest, inputs, peaks)]
    record = MachineRecord(**machine.to_dict(), peaks=asdict(peaks) if peaks else None)
    return BenchReport(machine=record, runs=runs, source=source, protocol=contest.protocol(reference is not None))
