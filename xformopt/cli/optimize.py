"""``xformopt optimize``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xformopt.cli import display
from xformopt.cli import options as o
from xformopt.cli.progress import showing_progress
from xformopt.errors import UsageError
from xformopt.lowering.catalog import TUNING_SECONDS

if TYPE_CHECKING:
    from rich.console import Console

    from xformopt.api import Optimized
    from xformopt.pipeline import Pass, Record
    from xformopt.program import Program

__all__ = ["optimize"]

# the recipe that keeps a precision as it is has a name of its own
_RECIPE_OF_PRECISION = {"fp32": "exact"}


def optimize(
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    output: o.Output = None,
    target: o.Target = "ort-cpu",
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME|FILE", help="Passes to run; `exact` otherwise.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="fp32|fp16|bf16|int8|int4", help="The recipe of that precision."),
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="NAME{OPTION=VALUE,...}", help="Append a pass; may be repeated."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DATA", help="An .npz, .safetensors or text file, one input per line."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Judge the result on a task, which supplies calibration data too."),
    ] = None,
    batch: o.Batch = None,
    length: o.Length = None,
    lengths: o.Lengths = None,
    batches: o.Batches = None,
    max_drift: Annotated[
        float | None,
        typer.Option("--max-drift", min=0.0, metavar="X", help="Relative L2 to the original a lossy pass may reach."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a pass over its budget instead of taking it back.")
    ] = False,
    keep_if_faster: Annotated[
        bool, typer.Option("--keep-if-faster", help="Take back lossy passes that buy no measured time.")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="FACT", help="A fact you vouch for, such as no-padding; may be repeated."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why candidates were left as they are.")] = False,
    print_ir_after: Annotated[
        list[str] | None,
        typer.Option("--print-ir-after", metavar="PASS|all", help="Print the program after a pass; may be repeated."),
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option("--save-recipe", metavar="FILE", help="Write the passes as a recipe file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run; write nothing.")] = False,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="Do not compare the result with the original.")] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Take the default form of every operator instead of timing them.")
    ] = False,
    no_program: o.NoProgram = False,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = None,
    seed: o.Seed = 0,
    threads: o.Threads = None,
    tune_seconds: o.TuneSeconds = TUNING_SECONDS,
    rounds: o.Rounds = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Optimize a model, lower it, and measure what that bought.

    Every pass is checked numerically as it runs; PATH becomes an artifact directory, whole or not at all.
    """
    name = o.the_model(model, model_option)
    chosen: dict[str, Any] = {
        "target": target,
        "recipe": _recipe(recipe, precision),
        "passes": pass_ or (),
        "batch": batch,
        "length": length,
        "trust_remote_code": trust_remote_code,
    }
    console = display.console_beside(json)
    display.check_json(json)
    o.warn_of_remote_code(trust_remote_code)
    if dry_run:
        _print_plan(name, chosen, json, console)
        return
    path = o.the_output(output)
    steps = _check_files(path, save_recipe, overwrite, chosen)
    printer = _printer(print_ir_after or (), steps)

    from xformopt import api

    with showing_progress(not quiet and printer is None) as progress:
        done = api.optimize(
            name,
            path,
            **chosen,
            lengths=o.the_sizes(lengths, "--lengths"),
            batches=o.the_sizes(batches, "--batches"),
            calibration=calibration or (),
            task=task,
            max_drift=max_drift,
            strict=strict,
            keep_if_faster=keep_if_faster,
            measure_lowering=not no_measure,
            bench=not no_bench,
            assume=assume or (),
            seed=seed,
            threads=threads,
            tuning_seconds=tune_seconds,
            rounds=rounds,
            overwrite=overwrite,
            keep_program=not no_program,
            progress=progress,
            observe=printer,
        )
    if save_recipe is not None:
        from xformopt.pipeline.recipes import save_recipe as write_recipe

        write_recipe(steps, save_recipe, description=f"as run on {name}")
    display.write_json(json, done.to_dict())
    _print_result(done, path, explain, console)


def _recipe(recipe: str | None, precision: str | None) -> str:
    if recipe is not None and precision is not None:
        raise UsageError("Both --recipe and --precision choose the recipe. Give one of them, and append with --pass.")
    if precision is not None:
        return _RECIPE_OF_PRECISION.get(precision, precision)
    return recipe or "exact"


def _check_files(path: Path, save_recipe: Path | None, overwrite: bool, chosen: dict[str, Any]) -> tuple[Pass, ...]:
    """Refuse outputs and passes that cannot be, before anything is loaded; returns the passes."""
    from xformopt.files import check_output

    check_output(path, overwrite)
    if save_recipe is not None:
        check_output(save_recipe, overwrite, marker=None)

    from xformopt.inspection import passes_of

    return passes_of(chosen["recipe"], chosen["passes"])


def _printer(wanted: Sequence[str], steps: Sequence[Pass]) -> Callable[[Record, Program], None] | None:
    """Return what prints the program after the passes that are asked for."""
    if not wanted:
        return None
    names = {name.replace("_", "-") for name in wanted}
    known = ["all", "lift", *(step.name for step in steps)]
    if unknown := sorted(names - set(known)):
        raise UsageError(f"--print-ir-after names {unknown[0]}, which is not run. Name one of: {', '.join(known)}.")

    def show(record: Record, program: Program) -> None:
        if names & {"all", record.name}:
            typer.echo(f"# after {record.name}\n{program}")

    return show


def _print_plan(name: str, chosen: dict[str, Any], json: Path | None, console: Console) -> None:
    from xformopt.inspection import plan

    planned = plan(name, **chosen)
    display.write_json(json, planned.to_dict())
    console.print(f"would lift, then run {len(planned.passes)} passes, then lower to {planned.target}:")
    for step in planned.passes:
        console.print(f"  {step}", markup=False)
    console.print(display.cost_lines(planned.inspection))


def _print_result(done: Optimized, path: Path, explain: bool, console: Console) -> None:
    from xformopt.report.terminal import print_report
    from xformopt.report.wording import bytes_

    for note in done.original.notes:
        console.print(f"note: {note}", markup=False)
    console.print(display.history_table(done.result.history))
    if explain:
        console.print()
        rejected = any(record.rejected for record in done.result.history)
        console.print(display.rejected_table(done.result.history) if rejected else "No candidate was left as it is.")
    if done.report is not None:
        console.print()
        print_report(done.report, console)
    if done.evaluation is not None:
        console.print()
        console.print(display.evaluation_lines(done.evaluation))
    console.print()
    if line := display.execution_line(done.artifact.manifest.execution):
        console.print(line, soft_wrap=True)
    beside = " with bench.json and report.html" if done.report is not None else ""
    console.print(f"wrote {path} ({bytes_(done.artifact.size_bytes)}){beside}", markup=False, soft_wrap=True)
