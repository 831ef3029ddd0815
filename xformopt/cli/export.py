"""``xformopt export``."""

from __future__ import annotations

from typing import Annotated

import typer

from xformopt.cli import options as o
from xformopt.cli.progress import showing_progress
from xformopt.lowering.catalog import TUNING_SECONDS

__all__ = ["export"]


def export(
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    output: o.Output = None,
    target: o.Target = "ort-cpu",
    batch: o.Batch = None,
    length: o.Length = None,
    lengths: o.Lengths = None,
    batches: o.Batches = None,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Take the default form of every operator instead of timing them.")
    ] = False,
    no_program: o.NoProgram = False,
    threads: o.Threads = None,
    tune_seconds: o.TuneSeconds = TUNING_SECONDS,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Lower a model as it is, to an artifact or a file.onnx."""
    name, path = o.the_model(model, model_option), o.the_output(output)
    o.warn_of_remote_code(trust_remote_code)

    from xformopt import api
    from xformopt.report.wording import bytes_

    with showing_progress(not quiet) as progress:
        artifact = api.export(
            name,
            path,
            target=target,
            batch=batch,
            length=length,
            lengths=o.the_sizes(lengths, "--lengths"),
            batches=o.the_sizes(batches, "--batches"),
            measure_lowering=not no_measure,
            threads=threads,
            tuning_seconds=tune_seconds,
            overwrite=overwrite,
            keep_program=not no_program,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    typer.echo(f"wrote {path} ({bytes_(artifact.size_bytes)})")
