"""Owns how a number and a verdict are written, the same in the terminal and in HTML."""

from __future__ import annotations

from collections.abc import Sequence

from xformopt.report.schema import BenchReport, FidelityRecord, Run

__all__ = [
    "MINUS",
    "TIMES",
    "UNKNOWN",
    "best_run",
    "busy",
    "bytes_",
    "headline",
    "interval",
    "milliseconds",
    "reference",
    "relative",
    "setting",
    "share",
    "speedup",
]

UNKNOWN, TIMES, MINUS = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
_UNITS = ("B", "KB", "MB", "GB", "TB")


def milliseconds(value: float | None) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return UNKNOWN
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:,.{digits}f}"


def bytes_(value: float | None) -> str:
    """In the decimal unit that keeps it below 1000."""
    if value is None:
        return UNKNOWN
    size, unit = float(value), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit and size < 99.5 else f"{size:.0f} {_UNITS[unit]}"


def interval(ends: Sequence[float] | None, unit: str = "") -> str:
    """As `low–high`, empty where it is not known."""
    if ends is None:
        return ""
    return f"{milliseconds(ends[0])}{UNKNOWN}{milliseconds(ends[1])}{unit}"


def speedup(run: Run) -> str:
    """As `2.31×`, or that there is none to speak of."""
    if run.speedup is None:
        return UNKNOWN
    if run.speedup.is_difference:
        return f"{run.speedup.ratio:.2f}{TIMES}"
    return "no difference"


def relative(value: float | None) -> str:
    """As an error: `3.1e-07`, or 0."""
    if value is None:
        return UNKNOWN
    return "0" if value == 0 else f"{value:.1e}"


def share(value: float | None, digits: int = 1) -> str:
    """As a percentage; what is not quite all, or not quite nothing, is not rounded to it."""
    if value is None:
        return UNKNOWN
    percent, step = 100 * value, 10.0**-digits
    if 0 < percent < step / 2:
        return f"<{step:.{digits}f}%"
    if percent < 100 and f"{percent:.{digits}f}" == f"{100:.{digits}f}":
        return f">{100 - step:.{digits}f}%"
    return f"{percent:.{digits}f}%"


def setting(report: BenchReport) -> str:
    """Say what the runs ran on: batch, length, threads, the processor."""
    first = next(iter(report.runs), None)
    parts = []
    if first is not None:
        parts.append(f"batch {first.batch}" if first.batch is not None else "")
        parts.append(_lengths(report.runs))
        if first.threads is not None:
            parts.append(f"{first.threads} thread{'s' if first.threads != 1 else ''}")
    parts.append(report.machine.cpu if report.machine.cpu != "unknown" else "")
    return ", ".join(part for part in parts if part)


def _lengths(runs: Sequence[Run]) -> str:
    found = sorted({run.length for run in runs if run.length is not None})
    return f"length {found[0]:,} to {found[-1]:,}" if len(found) > 1 else f"length {found[0]}" if found else ""


def reference(report: BenchReport) -> str:
    """Say what fidelity is to."""
    given = report.protocol.get("reference", "given")
    return "the original in eager fp32" if given == "given" else str(given)


def busy(report: BenchReport) -> str:
    """Warn that other work ran beside the measurement, or return nothing."""
    load, cores = report.machine.load_average, report.machine.cores
    if load is None or not cores or load < 0.5 * cores:
        return ""
    return (
        f"The machine was busy before the start (load {load:.1f} on {cores} cores): times are longer and "
        "intervals wider than on a quiet one."
    )


def best_run(report: BenchReport) -> Run | None:
    """Return the run with the highest speed-up that is one, or None."""
    faster = [run for run in report.runs if run.speedup and run.speedup.is_difference and run.speedup.ratio > 1]
    return max(faster, key=lambda run: run.speedup.ratio if run.speedup else 0.0, default=None)


def headline(report: BenchReport) -> tuple[str, str]:
    """Return the finding in one sentence, and what it rests on in a second."""
    subject = report.source or "the model"
    best = best_run(report)
    if best is not None and best.speedup is not None and best.latency_ms is not None:
        over = next((r for r in report.runs if r.name == best.speedup.over and r.length == best.length), None)
        before = f"{milliseconds(over.latency_ms.p50)} → " if over and over.latency_ms else ""
        several = len({run.length for run in report.runs}) > 1
        at = f" at length {best.length:,}" if several and best.length is not None else ""
        title = f"{subject}: {best.name} is {best.speedup.ratio:.2f}{TIMES} as fast as {best.speedup.over}{at}"
        basis = (
            f"Median latency {before}{milliseconds(best.latency_ms.p50)} ms; 95% interval of the speed-up "
            f"{interval(best.speedup.ci95)}{TIMES}; {setting(report)}. {_agreement(best.fidelity)}"
        )
        return title, basis
    if not any(run.latency_ms for run in report.runs):
        return f"{subject}: no run could be measured", "Each run's reason is given below."
    if not any(run.speedup for run in report.runs):
        return f"{subject}: measured, not compared", f"No two runs could be compared; {setting(report)}."
    return f"{subject}: no run is measurably faster", f"{setting(report)}."


def _agreement(fidelity: FidelityRecord | None) -> str:
    if fidelity is None or fidelity.relative_l2 is None:
        return ""
    return f"Outputs agree with the original to a relative L2 of {relative(fidelity.relative_l2)}."
