"""Owns runs of the same name at several lengths: their series, and from which length on one beats another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from xformopt.report.schema import Run

__all__ = ["Series", "Sweep", "sweep"]


@dataclass(frozen=True)
class Series:
    """One candidate at every length it was measured at; `over` says from where on it is the faster one, in words."""

    name: str
    runs: dict[int, Run]
    crossover: float | None
    over: str


@dataclass(frozen=True)
class Sweep:
    """All candidates of a report over the lengths; `base` names the one that the others are compared with."""

    lengths: tuple[int, ...]
    series: tuple[Series, ...]
    base: str | None


def sweep(runs: Sequence[Run]) -> Sweep | None:
    """Return the series of a report, or None where no run was measured at two lengths."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.latency_ms is not None and run.length is not None:
            found.setdefault(run.name, {})[run.length] = run
    if not any(len(measured) > 1 for measured in found.values()):
        return None
    base = next((run.speedup.over for run in runs if run.speedup is not None), None)
    lengths = tuple(sorted({length for measured in found.values() for length in measured}))
    series = tuple(
        Series(name, measured, *_crossing(measured, found.get(base or ""))) for name, measured in found.items()
    )
    return Sweep(lengths, series, base)


def _crossing(measured: dict[int, Run], base: dict[int, Run] | None) -> tuple[float | None, str]:
    """Return where a series crosses the other for good, drawn straight on logarithmic scales, and in words."""
    if base is None or base is measured:
        return None, ""
    common = [length for length in sorted(measured) if length in base]
    gaps = [_log_ms(measured[length]) - _log_ms(base[length]) for length in common]
    if not gaps or gaps[-1] >= 0:
        return None, "never here"
    if max(gaps) < 0:
        return None, "at every length here"
    last = max(index for index, gap in enumerate(gaps) if gap >= 0)
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    crossing = common[last] * (common[last + 1] / common[last]) ** share
    return crossing, f"from {crossing:,.0f} on"


def _log_ms(run: Run) -> float:
    assert run.latency_ms is not None
    return math.log(run.latency_ms.p50)
