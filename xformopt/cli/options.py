"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from xformopt.errors import UsageError

__all__ = [
    "Batch",
    "Batches",
    "Debug",
    "Json",
    "Length",
    "Lengths",
    "ModelArgument",
    "ModelOption",
    "NoProgram",
    "Output",
    "Overwrite",
    "Quiet",
    "Rounds",
    "Seed",
    "Target",
    "Threads",
    "TrustRemoteCode",
    "TuneSeconds",
    "the_model",
    "the_output",
    "the_sizes",
]

ModelArgument: TypeAlias = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Zoo name, directory, package.module:factory, .pt2 file or artifact."),
]
ModelOption: TypeAlias = Annotated[
    str | None,
    typer.Option("-m", "--model-name-or-path", metavar="MODEL", help="The same as MODEL."),
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option("-o", "--output-path", metavar="PATH", help="What to write."),
]
Target: TypeAlias = Annotated[str, typer.Option("--target", help="What to lower to; see `xformopt targets`.")]
Batch: TypeAlias = Annotated[
    int | None,
    typer.Option("--batch", min=1, metavar="N", help="Size of the batch; the model's example decides otherwise."),
]
Length: TypeAlias = Annotated[
    int | None,
    typer.Option("--length", min=1, metavar="N", help="Length of token inputs; like --batch."),
]
Lengths: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--lengths", metavar="N,N,...", help="For tvm-*: compile for each of these lengths; between them is padded."
    ),
]
Batches: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--batches", metavar="N,N,...", help="For tvm-*: compile for each of these; other batches run in parts."
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="Threads of every run; all usable cores otherwise."),
]
TuneSeconds: TypeAlias = Annotated[
    float,
    typer.Option(
        "--tune-seconds",
        min=0.0,
        metavar="S",
        help="How long to look for the fastest forms and tiles; what was found earlier on this machine is kept.",
    ),
]
Rounds: TypeAlias = Annotated[
    int | None,
    typer.Option("--rounds", min=1, metavar="N", help="Rounds of the measurement; chosen to last seconds otherwise."),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of everything random.")]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
NoProgram: TypeAlias = Annotated[
    bool, typer.Option("--no-program", help="Leave the original out of the artifact (it is as large as the weights).")
]
TrustRemoteCode: TypeAlias = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python files of the model's directory run.")
]
Json: TypeAlias = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help='Write the results as JSON; "-" is standard output.'),
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Debug: TypeAlias = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what libraries log.")]


def the_model(argument: str | None, option: str | None) -> str:
    """Return the one MODEL of a command line."""
    if argument is not None and option is not None:
        raise UsageError(f'The model is given twice: as "{argument}" and by -m as "{option}". Give it once.')
    if argument is None and option is None:
        raise UsageError("No model is given. Name one, as MODEL or with -m; `xformopt --help` says what it can be.")
    return str(argument if argument is not None else option)


def the_output(path: Path | None) -> Path:
    """Return the output path of a command line, which must be given."""
    if path is None:
        raise UsageError("No output is given. Say where to write with -o PATH.")
    return path


def the_sizes(text: str | None, option: str) -> list[int]:
    """Return the lengths or batches of a command line, ``32,64,128``."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if wrong := [part for part in parts if not part.isdigit() or not int(part)]:
        raise UsageError(f"{option} takes numbers such as 32,64,128, and {wrong[0]!r} is none.")
    return [int(part) for part in parts]


def warn_of_remote_code(trusted: bool) -> None:
    """Say that the model's own code may run."""
    if trusted:
        typer.echo("xformopt: note: --trust-remote-code lets Python files of the model's directory run.", err=True)
