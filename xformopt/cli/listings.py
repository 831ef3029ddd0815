"""``xformopt passes``, ``xformopt targets`` and ``xformopt models``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from xformopt.cli import display
from xformopt.cli import options as o

__all__ = ["models", "passes", "targets"]

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this pass, with its options.")] = None,
    json: _AsJson = False,
    debug: o.Debug = False,
) -> None:
    """List the passes, or describe one."""
    from xformopt.pipeline.index import describe, find_pass, list_passes

    found = [describe(find_pass(name))] if name is not None else list_passes()
    if json:
        display.print_json([dataclasses.asdict(info) for info in found])
        return
    console = display.console_beside(None)
    console.print(
        display.table(
            ["pass", "family", "effect", "what it does"],
            [(info.name, info.family, info.effect, info.summary) for info in found],
        )
    )
    if name is None:
        return
    for source in found[0].sources:
        console.print(f"source: {source}", markup=False)
    if found[0].options:
        console.print()
        rows = [(option.name, option.type, option.default, option.doc) for option in found[0].options]
        console.print(display.table(["option", "type", "default", "meaning"], rows))


def targets(json: _AsJson = False, debug: o.Debug = False) -> None:
    """List the targets, and why some are not available."""
    from xformopt.lowering import targets as list_targets

    found = list_targets()
    if json:
        display.print_json([{**target._asdict(), "why_not": target.why_not or None} for target in found])
        return
    rows = [(target.name, "yes" if target.available else "no", target.why_not) for target in found]
    display.console_beside(None).print(display.table(["target", "available", "why not"], rows))


def models(json: _AsJson = False, debug: o.Debug = False) -> None:
    """List the models of the zoo, and what running each on its example costs."""
    from xformopt.model_listing import list_models

    found = list_models()
    if json:
        display.print_json([info.to_dict() for info in found])
        return
    rows = [
        (
            info.name,
            "?" if info.parameters is None else f"{info.parameters:,}",
            "?" if info.flops is None else f"{info.flops / 1e9:,.3f}",
            info.summary,
            "; ".join(_shortened(source) for source in info.sources),
        )
        for info in found
    ]
    columns = ["model", "parameters", "GFLOP", "what it is", "sources"]
    display.console_beside(None).print(display.table(columns, rows, right=("parameters", "GFLOP")))


def _shortened(source: str) -> str:
    """Return the arXiv number of a source, which is enough to find it; the JSON has it whole."""
    _, found, number = source.rpartition("arXiv ")
    return f"arXiv {number}" if found else source
