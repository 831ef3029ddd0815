"""Owns the HTML report: one file, opens offline, no scripts; everything from outside is escaped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from xformopt.errors import DataError
from xformopt.report import wording
from xformopt.report.plots import latency_plot, length_plot, roofline_plot, run_color
from xformopt.report.schema import BenchReport, MachineRecord, OperatorShare, Run
from xformopt.report.side_by_side import side_by_side
from xformopt.report.sweep import Sweep, sweep

__all__ = ["render"]

_OPERATORS_SHOWN = 12


@dataclass(frozen=True)
class _OperatorRow:
    """One bar of a run's operator panel; `change` is against the run compared with."""

    name: str
    ms: float
    share: float
    count: int | None
    width: float  # percent of the longest bar of all panels
    change: str


@dataclass(frozen=True)
class _OperatorPanel:
    """The operators of one run; `compared` names the run that its changes are against, empty for none."""

    run: Run
    compared: str
    color: str
    total_ms: float
    rows: list[_OperatorRow]


def render(reports: Sequence[BenchReport]) -> str:
    """Render reports one after the other as one HTML page.

    Raises:
        DataError: There is nothing to render.

    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    if not reports:
        raise DataError("there is no report to render. Give at least one file that `xformopt bench --json` wrote.")
    environment = Environment(
        loader=PackageLoader("xformopt.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ms=wording.milliseconds,
        bytes=wording.bytes_,
        interval=wording.interval,
        relative=wording.relative,
        share=wording.share,
    )
    sections = [_section(report, f"r{index}", Markup) for index, report in enumerate(reports)]
    return environment.get_template("report.html.j2").render(
        sections=sections,
        beside=side_by_side(reports),
        machines=[(_machine_rows(machine), names) for machine, names in _machines(reports)],
        style=Markup(resources.files("xformopt.report").joinpath("report.css").read_text()),
        speedup=wording.speedup,
        run_color=run_color,
    )


def _section(report: BenchReport, key: str, markup: Any) -> dict[str, Any]:
    title, basis = wording.headline(report)
    lengths = sweep(report.runs)
    return {
        "key": key,
        "report": report,
        "title": title,
        "verdict": title.removeprefix(f"{report.source or 'the model'}: "),
        "basis": basis,
        "setting": wording.setting(report),
        "reference": wording.reference(report),
        "busy": wording.busy(report),
        "best": wording.best_run(report),
        "sweep": lengths,
        "colors": _colors(report.runs, lengths),
        "sweep_svg": markup(length_plot(lengths, f"{key}-lengths")) if lengths else "",
        "latency_svg": "" if lengths else markup(latency_plot(report.runs, f"{key}-latency")),
        "roofline_svg": markup(roofline_plot(report.runs, f"{key}-roofline")),
        "panels": _operator_panels(report.runs),
    }


def _colors(runs: Sequence[Run], lengths: Sweep | None) -> list[str]:
    """Return the color of every run; the runs of a series share one."""
    places = {series.name: index for index, series in enumerate(lengths.series)} if lengths else {}
    return [run_color(places.get(run.name, index)) for index, run in enumerate(runs)]


def _operator_panels(runs: Sequence[Run]) -> list[_OperatorPanel]:
    profiled = [(index, run) for index, run in enumerate(runs) if run.operators]
    longest = max((operator.ms for _, run in profiled for operator in run.operators or ()), default=0.0) or 1.0
    panels: list[_OperatorPanel] = []
    for index, run in profiled:
        earlier = _comparable(run, [panel.run for panel in panels])
        rows = _operator_rows(run, earlier, longest)
        total_ms = sum(operator.ms for operator in run.operators or ())
        panels.append(_OperatorPanel(run, earlier.name if earlier else "", run_color(index), total_ms, rows))
    return panels


def _operator_rows(run: Run, earlier: Run | None, longest: float) -> list[_OperatorRow]:
    before = {operator.name: operator.ms for operator in (earlier.operators or () if earlier else ())}
    operators = run.operators or []
    shown, rest = operators[:_OPERATORS_SHOWN], operators[_OPERATORS_SHOWN:]
    if rest:
        others = OperatorShare(
            name=f"{len(rest)} others",
            ms=sum(operator.ms for operator in rest),
            share=sum(operator.share for operator in rest),
            count=sum(operator.count or 0 for operator in rest),
        )
        shown = [*shown, others]
    return [
        _OperatorRow(
            operator.name,
            operator.ms,
            operator.share,
            operator.count,
            min(100 * operator.ms / longest, 100.0),
            _change(before, operator.name, operator.ms),
        )
        for operator in shown
    ]


def _comparable(run: Run, earlier: Sequence[Run]) -> Run | None:
    """Return the first earlier run that spends time in operators of the same names, or None."""
    names = {operator.name for operator in run.operators or ()}
    for other in earlier:
        # operators of unlike toolchains share at most a few names by chance
        if sum(operator.share for operator in other.operators or () if operator.name in names) >= 0.5:
            return other
    return None


def _change(before: dict[str, float], name: str, ms: float) -> str:
    if not before.get(name):
        return ""
    ratio = ms / before[name]
    if ratio >= 2:
        return f"{ratio:.1f}{wording.TIMES}"
    return f"{100 * (ratio - 1):+.0f}%".replace("-", wording.MINUS)


def _machines(reports: Sequence[BenchReport]) -> list[tuple[MachineRecord, list[str]]]:
    """Return each distinct machine, with the sources that were measured on it."""
    keyed = [(_identity(report.machine), report) for report in reports]
    grouped = itertools.groupby(sorted(keyed, key=lambda pair: pair[0]), key=lambda pair: pair[0])
    found = []
    for _, group in grouped:
        members = [report for _, report in group]
        found.append((members[0].machine, [report.source or "the model" for report in members]))
    return found


def _identity(machine: MachineRecord) -> str:
    # what drifts from one measurement to the next does not make another machine
    return machine.model_dump_json(exclude={"load_average", "clock_mhz", "peaks"})


def _machine_rows(machine: MachineRecord) -> list[tuple[str, str]]:
    peaks = machine.peaks or {}
    measured = (
        f"{peaks['gflops']:.0f} GFLOP/s fp32 matrix multiplication, {peaks['gbytes_s']:.1f} GB/s copy"
        if {"gflops", "gbytes_s"} <= set(peaks)
        else ""
    )
    cores = f"{machine.cores} usable" if machine.cores else ""
    if cores and machine.physical_cores:
        cores += f", {machine.physical_cores} physical"
    rows = [
        ("Processor", machine.cpu),
        ("Cores", cores),
        ("Instruction sets", " ".join(machine.isa)),
        ("Clock", f"{machine.clock_mhz:.0f} MHz" if machine.clock_mhz else ""),
        ("Governor", machine.governor or ""),
        ("Memory", wording.bytes_(machine.memory_bytes) if machine.memory_bytes else ""),
        ("Measured peaks", measured),
        ("Load before the start", "" if machine.load_average is None else f"{machine.load_average:.2f}"),
        ("System", " ".join(part for part in (machine.os, machine.architecture) if part)),
        ("Python", machine.python or ""),
        ("Packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())),
        (
            "Thread variables",
            ", ".join(f"{name}={value}" for name, value in machine.thread_variables.items()),
        ),
    ]
    return [(label, value) for label, value in rows if value]
