"""``xformopt doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from xformopt.cli import display
from xformopt.cli import options as o

__all__ = ["doctor"]


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: o.Debug = False,
) -> None:
    """Say what this installation can do, and what would help it."""
    from xformopt.doctor import diagnose

    found = diagnose()
    if json:
        display.print_json(found.to_dict())
        return
    console = display.console_beside(None)
    console.print(display.table(["", ""], found.rows()))
    console.print()
    rows = [
        (target["name"], "yes" if target["available"] else "no", target["why_not"] or "") for target in found.targets
    ]
    console.print(display.table(["target", "available", "why not"], rows))
    for hint in found.hints:
        console.print(f"hint: {hint}", markup=False)
