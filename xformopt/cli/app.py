"""The commands, by name."""

from __future__ import annotations

from typing import Annotated

import typer

from xformopt.cli.bench import bench
from xformopt.cli.bundle import bundle
from xformopt.cli.doctor import doctor
from xformopt.cli.evaluate import evaluate
from xformopt.cli.export import export
from xformopt.cli.inspect import inspect
from xformopt.cli.listings import models, passes, targets
from xformopt.cli.optimize import optimize
from xformopt.cli.report import report

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (optimize, export, inspect, bench, bundle, report, evaluate, passes, targets, models, doctor):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from xformopt import __version__

        typer.echo(f"xformopt {__version__}")
        raise typer.Exit


@app.callback()
def xformopt(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """A compiler for transformer-like models: capture, optimize with verified passes, lower, and measure.

    MODEL is a zoo name (see models), a Hugging Face directory, package.module:factory, a .pt2 file or an artifact
    directory. Exit status: 0 done, 1 the work failed, 2 wrong usage.
    """
