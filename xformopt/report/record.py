"""Owns turning measurements into the records of the schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from xformopt.measure.machine import Peaks
from xformopt.measure.runner import OperatorTime
from xformopt.measure.statistics import Interval, median_interval, percentiles, ratio_of_medians
from xformopt.report.schema import Latency, NodeTime, OperatorShare, Roofline, Speedup

__all__ = ["latency", "operator_shares", "roofline", "slowest_nodes", "speedup"]

_NODES_KEPT = 40


def latency(rounds: Sequence[Sequence[float]], seed: int) -> Latency:
    """Summarize the samples of one run, by round, in milliseconds."""
    samples = [sample for samples in rounds for sample in samples]
    return Latency(**asdict(percentiles(samples)), ci95=_ends(median_interval(rounds, seed=seed)))


def speedup(over: str, baseline: Sequence[Sequence[float]], rounds: Sequence[Sequence[float]], seed: int) -> Speedup:
    """Compare the samples of a run with those of the run named `over`."""
    ratio = ratio_of_medians(baseline, rounds, seed=seed)
    return Speedup(over=over, ratio=ratio.value, ci95=_ends(ratio.interval))


def operator_shares(nodes: Sequence[OperatorTime], rounds: int) -> list[OperatorShare]:
    """Sum a profile over `rounds` runs by operator type, slowest first, per run of the model."""
    total = sum(node.total_ms for node in nodes) or 1.0
    kinds: dict[str, tuple[float, int]] = {}
    for node in nodes:
        ms, count = kinds.get(node.op_type, (0.0, 0))
        kinds[node.op_type] = (ms + node.total_ms, count + node.count)
    shares = [
        OperatorShare(name=kind, ms=ms / rounds, share=ms / total, count=round(count / rounds))
        for kind, (ms, count) in kinds.items()
    ]
    return sorted(shares, key=lambda share: -share.ms)


def slowest_nodes(nodes: Sequence[OperatorTime], rounds: int) -> list[NodeTime]:
    """Return the slowest nodes of a profile over `rounds` runs, per run of the model."""
    slowest = sorted(nodes, key=lambda node: -node.total_ms)[:_NODES_KEPT]
    return [NodeTime(name=node.name, operator=node.op_type, ms=node.total_ms / rounds) for node in slowest]


def roofline(flops: float, bytes_moved: float, ms: float, peaks: Peaks) -> Roofline:
    """Place a run of `ms` milliseconds under the peaks of the machine."""
    intensity = flops / bytes_moved
    return Roofline(
        gflops=flops / ms / 1e6,
        gbytes_s=bytes_moved / ms / 1e6,
        peak_gflops=peaks.gflops,
        peak_gbytes_s=peaks.gbytes_s,
        intensity=intensity,
        bound="compute" if intensity * peaks.gbytes_s >= peaks.gflops else "memory",
    )


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return (interval.low, interval.high) if interval else None
