"""``xformopt evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from xformopt.cli import display
from xformopt.cli import options as o
from xformopt.cli.progress import showing_progress
from xformopt.errors import UsageError

__all__ = ["evaluate"]


def evaluate(
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="digits, 'digits{fold=2}', or your own package.module:Class."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Where a model runs: eager otherwise. An artifact has its own.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME|FILE", help="How a model gets to a target it is lowered to.")
    ] = "exact",
    threads: o.Threads = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Judge a model or an artifact on a task, beside its original.

    A trained model is judged on the fold of the data that it was trained without.
    """
    name = o.the_model(model, model_option)
    if task is None:
        from xformopt.models.tasks.index import tasks

        raise UsageError(f"No task is given. Name one with --task: {', '.join(tasks())}, or package.module:Class.")
    display.check_json(json)
    o.warn_of_remote_code(trust_remote_code)

    from xformopt import api

    with showing_progress(not quiet) as progress:
        found = api.evaluate(
            name,
            task,
            target=target,
            recipe=recipe,
            threads=threads,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    display.write_json(json, found.to_dict())
    display.console_beside(json).print(display.evaluation_lines(found))
