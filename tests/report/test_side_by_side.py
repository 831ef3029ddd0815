"""Runs of several machines in one table."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from xformopt.cli import main
from xformopt.report.html import render
from xformopt.report.schema import BenchReport, Latency, MachineRecord, Run
from xformopt.report.side_by_side import side_by_side, side_table


def report(cpu: str, p50: float | None, *names: str, source: str = "minilm", length: int = 128) -> BenchReport:
    latency = None if p50 is None else Latency(p50=p50, p90=p50, p99=p50, ci95=(p50 - 0.5, p50 + 0.5))
    runs = [
        Run(
            name=name,
            target="ort-cpu",
            batch=1,
            length=length,
            threads=2,
            latency_ms=latency,
            error=None if p50 else "x",
        )
        for name in names
    ]
    return BenchReport(machine=MachineRecord(cpu=cpu, architecture="x86_64"), source=source, runs=runs)


def test_one_column_for_each_machine() -> None:
    table = side_by_side([report("Xeon", 4.0, "int8", "fp32"), report("Cortex", 40.0, "int8")])
    assert table is not None
    assert table.machines == ("Xeon, x86_64, 2 threads", "Cortex, x86_64, 2 threads")
    assert [row.name for row in table.rows] == ["int8", "fp32"]
    assert [run.latency_ms.p50 if run and run.latency_ms else None for run in table.rows[0].runs] == [4.0, 40.0]
    assert table.rows[1].runs[1] is None


def test_machines_that_read_the_same_are_numbered() -> None:
    table = side_by_side([report("Xeon", 4.0, "int8"), report("Xeon", 5.0, "int8")])
    assert table is not None
    assert table.machines == ("Xeon, x86_64, 2 threads (1)", "Xeon, x86_64, 2 threads (2)")


@pytest.mark.parametrize(
    "other",
    [
        report("Cortex", 1.0, "fp32"),
        report("Cortex", 1.0, "int8", source="deit"),
        report("Cortex", 1.0, "int8", length=64),
        BenchReport(),
    ],
)
def test_what_is_not_the_same_run_is_not_compared(other: BenchReport) -> None:
    assert side_by_side([report("Xeon", 4.0, "int8"), other]) is None
    assert "side by side" not in render([report("Xeon", 4.0, "int8"), other])


def test_the_terminal_and_the_page_show_it() -> None:
    reports = [report("Xeon", 4.25, "int8"), report("<b>Cortex", None, "int8")]
    table = side_by_side(reports)
    assert table is not None
    shown = Console(file=io.StringIO(), width=90)
    shown.print(side_table(table))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "4.25" in text
    assert "failed" in text
    page = render(reports)
    assert "Machines side by side" in page
    assert "<b>Cortex" not in page


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, cpu in (("a", "Xeon"), ("b", "Cortex")):
        report(cpu, 4.25, "int8").to_json(tmp_path / f"{name}.json")
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "-o", str(output)]) == 0
    assert "Cortex" in capsys.readouterr().out
    assert "Machines side by side" in output.read_text()
