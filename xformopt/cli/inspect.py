"""``xformopt inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from xformopt.cli import display
from xformopt.cli import options as o

__all__ = ["inspect"]


def inspect(
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    ir: Annotated[bool, typer.Option("--ir", help="Print the program at the lifted level.")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Print parameters, operations and operators.")] = False,
    batch: o.Batch = None,
    length: o.Length = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Show a model at the lifted level and what it costs.

    A multiply-add is two operations, counted at the example's sizes or at --batch and --length.
    """
    name = o.the_model(model, model_option)
    display.check_json(json)
    o.warn_of_remote_code(trust_remote_code)
    console = display.console_beside(json)

    from xformopt import api

    found = api.inspect(name, batch=batch, length=length, trust_remote_code=trust_remote_code)
    display.write_json(json, {**found.to_dict(), **({"ir": str(found.program)} if ir else {})})
    if ir:
        console.print(str(found.program), markup=False, soft_wrap=True)
    if cost or not ir:
        console.print(display.cost_lines(found))
