"""Owns the table that puts the same runs of several reports side by side: one column for each report, by machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from xformopt.report import wording
from xformopt.report.schema import BenchReport, Run

__all__ = ["Row", "SideBySide", "side_by_side", "side_table"]


class Row(NamedTuple):
    """One run, by what it is, and how each report measured it; None where a report has no such run."""

    source: str
    name: str
    target: str
    setting: str
    runs: tuple[Run | None, ...]


class SideBySide(NamedTuple):
    """The table: a heading for each report, and the runs."""

    machines: tuple[str, ...]
    rows: tuple[Row, ...]


def side_by_side(reports: Sequence[BenchReport]) -> SideBySide | None:
    """Return the table of the runs in reports of several machines; None where no run occurs in two of them.

    Runs are the same if source, name, target, batch and length are.
    """
    found: dict[tuple[str, str, str, str], list[Run | None]] = {}
    for column, report in enumerate(reports):
        for run in report.runs:
            key = (report.source or "the model", run.name, run.target, _setting(run))
            cells = found.setdefault(key, [None] * len(reports))
            cells[column] = run
    if not any(sum(run is not None for run in cells) > 1 for cells in found.values()):
        return None
    return SideBySide(_headings(reports), tuple(Row(*key, tuple(cells)) for key, cells in found.items()))


def side_table(table: SideBySide) -> Table:
    """Build the table for a terminal: median milliseconds, and below it their interval."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    drawn.add_column("p50, ms", overflow="fold")
    for machine in table.machines:
        drawn.add_column(machine, justify="right", overflow="fold")
    for row in table.rows:
        label = Text.assemble((row.name, "bold"), "\n", (f"{row.target} {row.setting}".strip(), "dim"))
        drawn.add_row(label, *(_cell(run) for run in row.runs))
    return drawn


def _cell(run: Run | None) -> Text:
    if run is None:
        return Text(wording.UNKNOWN)
    if run.latency_ms is None:
        return Text("failed", style="red")
    interval = f"{'partial ' if run.partial else ''}{wording.interval(run.latency_ms.ci95)}".strip()
    return Text.assemble(wording.milliseconds(run.latency_ms.p50), "\n", (interval, "dim"))


def _setting(run: Run) -> str:
    parts = (("batch", run.batch), ("length", run.length))
    return ", ".join(f"{name} {size}" for name, size in parts if size is not None)


def _headings(reports: Sequence[BenchReport]) -> tuple[str, ...]:
    """Name each report's machine and threads, numbered where two read the same."""
    plain = [_heading(report) for report in reports]
    times, seen = Counter(plain), Counter[str]()
    headings = []
    for heading in plain:
        seen[heading] += 1
        headings.append(heading if times[heading] == 1 else f"{heading} ({seen[heading]})")
    return tuple(headings)


def _heading(report: BenchReport) -> str:
    threads = next((run.threads for run in report.runs if run.threads is not None), None)
    parts = [report.machine.cpu, report.machine.architecture or ""]
    if threads is not None:
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}")
    return ", ".join(part for part in parts if part)
