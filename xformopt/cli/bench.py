"""``xformopt bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from xformopt.cli import display
from xformopt.cli import options as o
from xformopt.cli.progress import showing_progress
from xformopt.errors import MeasurementError, UsageError

__all__ = ["bench"]


def bench(
    candidates: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL|DIR|FILE.onnx...", help="What to measure.")
    ] = None,
    model_option: o.ModelOption = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            metavar="NAME,...",
            help="Targets to run the original on: ort-cpu,eager for a model; else eager, where an artifact holds it.",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME|FILE", help="How the original gets to targets it is lowered to.")
    ] = "exact",
    batch: o.Batch = None,
    length: o.Length = None,
    threads: o.Threads = None,
    rounds: o.Rounds = None,
    over: Annotated[
        str | None, typer.Option("--over", metavar="RUN", help="The run that speed-ups are over; eager otherwise.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
    seed: o.Seed = 0,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure systems against each other on the same inputs.

    Each runs in a process of its own, in interleaved rounds, and is timed only if its outputs are right.
    """
    items = [*(candidates or ()), *([model_option] if model_option else ())]
    if not items:
        raise UsageError("There is nothing to measure. Name a model, an artifact directory or an .onnx file.")
    display.check_json(json)
    o.warn_of_remote_code(trust_remote_code)
    wanted = None if targets is None else [name.strip() for name in targets.split(",") if name.strip()]

    from xformopt import api
    from xformopt.report.terminal import print_report

    with showing_progress(not quiet) as progress:
        report = api.bench(
            items,
            targets=wanted,
            recipe=recipe,
            batch=batch,
            length=length,
            threads=threads,
            rounds=rounds,
            over=over,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    display.write_json(json, report.to_dict())
    print_report(report, display.console_beside(json))
    if failed := [run for run in report.runs if run.error is not None]:
        names = ", ".join(run.name for run in failed)
        raise MeasurementError(f"{len(failed)} of {len(report.runs)} runs failed ({names}): {failed[0].error}")
