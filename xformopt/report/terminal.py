"""Owns the table that `bench` prints in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xformopt.report import wording
from xformopt.report.schema import BenchReport, Run

__all__ = ["print_report", "runs_table"]


def print_report(report: BenchReport, console: Console | None = None) -> None:
    """Print the comparison, then a paragraph for every run that failed, fell back or has a note."""
    console = console or Console()
    if report.runs:
        title, basis = wording.headline(report)
        console.print(Text(title, style="bold"))
        console.print(Text(basis, style="dim"))
        console.print(runs_table(report))
    if wording.busy(report):
        console.print(Text(wording.busy(report), style="yellow"))
    for run in report.runs:
        if run.error is not None:
            console.print(Text.assemble((f"{run.name} failed: ", "bold red"), run.error))
        for line in run.fallbacks:
            console.print(Text.assemble((f"{run.name} falls back: ", "bold yellow"), line))
        for line in run.notes:
            console.print(Text.assemble((f"{run.name}: ", "bold"), line))


def runs_table(report: BenchReport) -> Table:
    """Build the comparison: two lines per run, so that it fits 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), collapse_padding=True, header_style="bold", pad_edge=False)
    table.add_column("run\ntarget", overflow="fold", min_width=10)
    for header in (
        "p50 ms\n95% interval",
        "speed-up\n95% interval",
        "memory\nmodel's own",
        "size\n",
        "rel. L2\ntop-1",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for run in report.runs:
        table.add_row(*_cells(run))
    return table


def _cells(run: Run) -> list[Text]:
    label = Text.assemble((run.name, "bold"), "\n", (run.target, "dim"))
    if run.error is not None or run.latency_ms is None:
        return [
            label,
            Text("failed", style="red"),
            Text(wording.UNKNOWN),
            Text(wording.UNKNOWN),
            _pair(wording.bytes_(run.size_bytes)),
            Text(wording.UNKNOWN),
        ]
    fidelity = run.fidelity
    return [
        label,
        _pair(wording.milliseconds(run.latency_ms.p50), wording.interval(run.latency_ms.ci95)),
        _speedup(run),
        _pair(wording.bytes_(run.peak_memory_bytes), wording.bytes_(run.model_memory_bytes)),
        _pair(wording.bytes_(run.size_bytes)),
        _pair(wording.relative(fidelity.relative_l2), wording.share(fidelity.top1_agreement))
        if fidelity
        else Text(wording.UNKNOWN),
    ]


def _speedup(run: Run) -> Text:
    if run.speedup is None:
        return Text(wording.UNKNOWN)
    style = "dim"
    if run.speedup.is_difference:
        style = "green" if run.speedup.ratio > 1 else "red"
    return _pair(wording.speedup(run), wording.interval(run.speedup.ci95, wording.TIMES), style)


def _pair(first: str, second: str = "", style: str = "") -> Text:
    return Text.assemble((first, style), "\n", (second, "dim"))
