"""Owns turning a contest into the values of the bench schema, which `report.schema` describes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from xformopt.measure.contest import BenchSettings, Contest, Entry
from xformopt.measure.machine import Peaks
from xformopt.measure.runner import Array, OperatorTime
from xformopt.measure.statistics import Interval, median_interval, percentiles, ratio_of_medians

__all__ = ["summarize"]

_NODES_KEPT = 40


def summarize(contest: Contest, inputs: Mapping[str, Array], peaks: Peaks | None) -> list[dict[str, Any]]:
    """Return the run of every candidate, in the order given; one that failed has `error` and no times."""
    shape = _batch_and_length(inputs, contest.settings)
    return [_run(entry, contest, shape, peaks) for entry in contest.entries]


def _batch_and_length(inputs: Mapping[str, Array], settings: BenchSettings) -> tuple[int | None, int | None]:
    first = next(iter(inputs.values()))
    tokens = [value for value in inputs.values() if value.ndim >= 2 and value.dtype.kind in "iu"]
    batch = first.shape[0] if first.ndim else None
    length = tokens[0].shape[1] if tokens else None
    return settings.batch or batch, settings.length or length


def _run(entry: Entry, contest: Contest, shape: tuple[int | None, int | None], peaks: Peaks | None) -> dict[str, Any]:
    candidate, opened = entry.candidate, entry.opened
    run: dict[str, Any] = {
        "name": candidate.name,
        "target": candidate.target,
        "batch": shape[0],
        "length": shape[1],
        "threads": contest.threads,
        "precision": opened.get("precision", candidate.precision),
        "size_bytes": opened.get("size_bytes"),
        "fallbacks": opened.get("fallbacks", []),
        "notes": entry.notes,
        "error": entry.error,
    }
    if entry.error is not None:
        return run
    seed, samples = contest.settings.seed, [sample for taken in entry.rounds for sample in taken]
    p50 = percentiles(samples).p50
    run |= {
        "latency_ms": {**asdict(percentiles(samples)), "ci95": _ends(median_interval(entry.rounds, seed=seed))},
        "samples_ms": [round(sample, 6) for sample in samples],
        "round_p50_ms": [round(statistics.median(taken), 6) for taken in entry.rounds],
        "load_ms": opened["load_ms"],
        "first_run_ms": opened["first_run_ms"],
        "peak_memory_bytes": entry.peak_memory_bytes,
        "base_memory_bytes": opened["base_memory_bytes"],
        "fidelity": opened["fidelity"],
        "speedup": _speedup(entry, contest),
    }
    if entry.stopped is not None:
        run["partial"] = True
        run["notes"] = [*entry.notes, f"stopped after {len(entry.rounds)} of {contest.rounds} rounds: {entry.stopped}"]
    if entry.profiled:
        run["operators"] = _operator_shares(entry.profiled, contest.settings.profile_rounds)
        run["nodes"] = _slowest_nodes(entry.profiled, contest.settings.profile_rounds)
    if peaks and candidate.flops and candidate.bytes_moved:
        run["roofline"] = _roofline(candidate.flops, candidate.bytes_moved, p50, peaks)
    return run


def _speedup(entry: Entry, contest: Contest) -> dict[str, Any] | None:
    baseline = contest.baseline
    # a run that was compared with nothing may be fast and wrong
    if entry is baseline or baseline.error is not None or not entry.opened["fidelity"]:
        return None
    ratio = ratio_of_medians(baseline.rounds, entry.rounds, seed=contest.settings.seed)
    return {"over": baseline.candidate.name, "ratio": ratio.value, "ci95": _ends(ratio.interval)}


def _operator_shares(nodes: Sequence[OperatorTime], rounds: int) -> list[dict[str, Any]]:
    """Sum a profile over `rounds` runs by operator type, slowest first, per run of the model."""
    total = sum(node.total_ms for node in nodes) or 1.0
    kinds: dict[str, tuple[float, int]] = {}
    for node in nodes:
        ms, count = kinds.get(node.op_type, (0.0, 0))
        kinds[node.op_type] = (ms + node.total_ms, count + node.count)
    slowest = sorted(kinds.items(), key=lambda kind: -kind[1][0])
    return [
        {"name": name, "ms": ms / rounds, "share": ms / total, "count": round(count / rounds)}
        for name, (ms, count) in slowest
    ]


def _slowest_nodes(nodes: Sequence[OperatorTime], rounds: int) -> list[dict[str, Any]]:
    """Return the slowest nodes of a profile over `rounds` runs, per run of the model."""
    slowest = sorted(nodes, key=lambda node: -node.total_ms)[:_NODES_KEPT]
    return [{"name": node.name, "operator": node.op_type, "ms": node.total_ms / rounds} for node in slowest]


def _roofline(flops: float, bytes_moved: float, ms: float, peaks: Peaks) -> dict[str, Any]:
    """Place a run of `ms` milliseconds under the peaks of the machine."""
    intensity = flops / bytes_moved
    return {
        "gflops": flops / ms / 1e6,
        "gbytes_s": bytes_moved / ms / 1e6,
        "peak_gflops": peaks.gflops,
        "peak_gbytes_s": peaks.gbytes_s,
        "intensity": intensity,
        "bound": "compute" if intensity * peaks.gbytes_s >= peaks.gflops else "memory",
    }


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return (interval.low, interval.high) if interval else None
