"""How results look on a terminal."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xformopt.evaluation import Evaluation
    from xformopt.inspection import Inspection
    from xformopt.pipeline import Record

__all__ = [
    "check_json",
    "console_beside",
    "cost_lines",
    "evaluation_lines",
    "history_table",
    "print_json",
    "rejected_table",
    "table",
    "write_json",
]


def console_beside(json_path: Path | None) -> Console:
    """Return where tables go: standard output, unless JSON goes there."""
    from rich.console import Console

    return Console(stderr=_is_stdout(json_path), highlight=False)


def check_json(path: Path | None) -> None:
    """Find out before long work whether the JSON file could be written."""
    from xformopt.files import check_output

    if path is not None and not _is_stdout(path):
        check_output(path, overwrite=True, marker=None)


def write_json(path: Path | None, values: Any) -> None:
    """Write results as JSON to a file, or to standard output for ``-``."""
    from xformopt.files import write_atomically

    if path is None:
        return
    if _is_stdout(path):
        print_json(values)
    else:
        write_atomically(path, _as_json(values))


def print_json(values: Any) -> None:
    """Print values as JSON on standard output."""
    sys.stdout.write(_as_json(values))


def _as_json(values: Any) -> str:
    return json.dumps(_sayable(values), indent=1, default=str, allow_nan=False) + "\n"


def _sayable(values: Any) -> Any:
    """Return values with null for what JSON cannot say: NaN and infinity."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {key: _sayable(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_sayable(value) for value in values]
    return values


def _is_stdout(path: Path | None) -> bool:
    return path is not None and str(path) == "-"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """Build a plain table; the columns named in ``right`` are aligned right."""
    from rich.table import Table
    from rich.text import Text

    built = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_header=any(columns))
    for column in columns:
        built.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(str(cell)) for cell in row))
    return built


def history_table(records: Sequence[Record]) -> Table:
    """Tell what each pass did."""
    from xformopt.report import wording

    rows = [
        (
            record.name,
            record.effect,
            record.fired,
            sum(count for _, count in record.rejected),
            wording.relative(record.drift),
            f"{record.seconds:.1f} s",
            f"taken back: {record.dropped}" if record.dropped else "; ".join(record.notes),
        )
        for record in records
    ]
    columns = ["pass", "effect", "fired", "rejected", "drift", "time"]
    if any(row[-1] for row in rows):
        columns.append("note")
    right = ("fired", "rejected", "drift", "time")
    return table(columns, [row[: len(columns)] for row in rows], right=right)


def rejected_table(records: Sequence[Record]) -> Table:
    """Tell why candidates were left as they are, by pass and reason."""
    grouped: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for record in records:
        for reason, count in record.rejected:
            # reasons that differ in nothing but the value they name are one reason
            grouped.setdefault((record.name, re.sub(r"%[\w.]+", "%", reason)), []).append((reason, count))
    rows = [
        (name, sum(count for _, count in members), members[0][0] + (", and the like" if len(members) > 1 else ""))
        for (name, _), members in grouped.items()
    ]
    return table(["pass", "count", "left as it is because"], rows, right=("count",))


def cost_lines(inspection: Inspection) -> Table:
    """Tell what a Program costs: the sums, then how many there are of each operator."""
    from xformopt.report import wording

    cost = inspection.cost
    sizes = ", ".join(f"{name} {size}" for name, size in cost.sizes.items()) or "the only size"
    rows = [
        ("parameters", f"{cost.parameters:,} ({wording.bytes_(cost.parameter_bytes)})"),
        ("operations", f"{cost.flops / 1e9:,.3f} GFLOP at {sizes}"),
        ("data moved", f"{wording.bytes_(cost.bytes)} if operators share nothing"),
        ("operators", f"{cost.nodes:,}"),
        *((f"  {name}", count) for name, count in cost.operators.items()),
    ]
    return table(["", ""], rows)


def evaluation_lines(evaluation: Evaluation) -> Table:
    """Tell what a model reached on a task, its original beside it, and what trivial predictors reach."""
    task, score, baseline = evaluation.task, evaluation.score, evaluation.baseline
    where = f"{task.name}, {score.count:,} items" + (f" of fold {task.fold}" if task.folds > 1 else "")
    rows = [(where, "", ""), (evaluation.target, task.metric, f"{score.value:.4f}")]
    if baseline is not None and evaluation.target != "eager":
        rows.append(("the original in eager mode", "", f"{baseline.value:.4f}"))
    if baseline is not None and evaluation.target != "eager" and (interval := evaluation.difference):
        difference = f"{score.value - baseline.value:+.4f}, 95% between {interval.low:+.4f} and {interval.high:+.4f}"
        rows.append(("difference", "", difference))
    rows += [("", name.replace("_", " "), f"{value:.4g}") for name, value in score.details.items()]
    rows += [(f"for comparison: {name}", "", f"{value:.4f}") for name, value in task.baselines().items()]
    return table(["", "", ""], rows)
