"""``xformopt bundle``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xformopt.cli import options as o

__all__ = ["bundle"]


def bundle(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Artifacts of one model.")],
    output: o.Output = None,
    batch: o.Batch = None,
    length: o.Length = None,
    overwrite: o.Overwrite = False,
    seed: o.Seed = 0,
    debug: o.Debug = False,
) -> None:
    """Pack artifacts with a runner that measures them on machines without xformopt."""
    from xformopt.bundle.pack import write_bundle
    from xformopt.files import check_output
    from xformopt.report.wording import bytes_

    path = o.the_output(output)
    check_output(path, overwrite, marker=None)
    made = write_bundle(folders, path, batch=batch, length=length, seed=seed, overwrite=overwrite)
    for note in made.notes:
        typer.echo(f"xformopt: note: {note}", err=True)
    typer.echo(f"wrote {path} ({bytes_(path.stat().st_size)}): {', '.join(made.names)}")
    typer.echo(f"on the device: python -m zipfile -e {path.name} bundle && cd bundle && python -m runner")
