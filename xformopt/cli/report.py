"""``xformopt report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xformopt.cli import options as o

__all__ = ["report"]


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="FILE.json|DIR...", help="What bench or optimize wrote, or artifacts.")
    ],
    output: o.Output = Path("report.html"),
    overwrite: o.Overwrite = False,
    debug: o.Debug = False,
) -> None:
    """Write measurements as one HTML file that opens offline; those of several machines also side by side."""
    from rich.console import Console

    from xformopt.files import check_output, write_atomically
    from xformopt.report.html import render
    from xformopt.report.schema import BenchReport
    from xformopt.report.side_by_side import side_by_side, side_table

    path = o.the_output(output)
    check_output(path, overwrite, marker=None)
    files = [source / "bench.json" if source.is_dir() else source for source in sources]
    reports = [BenchReport.from_json(file) for file in files]
    write_atomically(path, render(reports))
    if (table := side_by_side(reports)) is not None:
        Console().print(side_table(table))
    typer.echo(f"wrote {path}")
