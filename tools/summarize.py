"""Write tools/results/README.md: the measured results that the README of the project has no room for, as tables.

python tools/summarize.py           rewrites it from tools/results/*.json, whatever of them there is
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xformopt.report.wording import milliseconds

RESULTS = Path(__file__).parent / "results"
Rows = Sequence[Sequence[str]]


def table(header: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table whose columns are right-aligned but the first."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def reduction(found: Mapping[str, Any]) -> str:
    """Doing less: FLOPs, time and accuracy of each technique, model by model."""
    parts = []
    for name, entry in found["models"].items():
        trained = "exact" in entry
        about = f"`{name}`"
        if trained:
            unit = " (lower is better)" if not entry["higher_is_better"] else ""
            about += (
                f": {entry['metric']}{unit} on `{entry['task']}`, {entry['count']} items, exact {entry['exact']:.4f}"
            )
        header = [
            "technique",
            "FLOPs left",
            "times as fast",
            *(["metric", "after 1 min of recovery"] if trained else []),
        ]
        rows = []
        for technique, row in entry["techniques"].items():
            if technique == "exact":
                continue
            if "refused" in row:
                rows.append([technique, *["refused"] * (len(header) - 1)])
                continue
            cells = [technique, f"{row['flops_left']:.0%}", speedup(row.get("speedup"))]
            if trained:
                again = row.get("recovered", {})
                cells += [f"{row['value']:.4f}", f"{again['value']:.4f}" if "value" in again else "not trained"]
            rows.append(cells)
        parts.append(f"{about}\n\n{table(header, rows)}\n{slower(entry['techniques'])}")
    return "\n\n".join(parts)


def speedup(found: Mapping[str, Any] | None) -> str:
    """Return a ratio with its interval."""
    if found is None:
        return "fails"
    ends = f" ({found['ci95'][0]:.2f} to {found['ci95'][1]:.2f})" if found.get("ci95") else ""
    return f"{found['ratio']:.2f}{ends}"


def slower(techniques: Mapping[str, Any]) -> str:
    """Name what brings no time, with the operators that take what it saves; and what refuses, with the reason."""
    lines = []
    for technique, row in techniques.items():
        if "refused" in row:
            lines.append(f"- {technique}: {row['refused']}")
        elif change := row.get("operator_change_ms"):
            told = ", ".join(f"{key} {ms:+.2f} ms" for key, ms in change.items())
            lines.append(f"- {technique} is no faster; against the exact artifact: {told}.")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def low_bit(found: Mapping[str, Any]) -> str:
    """Few bits: what each method reaches on each task at each width."""
    parts = [f"{found['judged'].capitalize()}."]
    for name, entry in found["tasks"].items():
        direction = "" if entry["higher_is_better"] else ", lower is better"
        about = f"`{entry['model']}` on `{name}` ({entry['metric']}{direction}, {entry['count']} items): fp32"
        methods = list(dict.fromkeys(method for width in entry["widths"].values() for method in width))
        rows = [
            [label, *(reached(width.get(method)) for method in methods)] for label, width in entry["widths"].items()
        ]
        parts.append(f"{about} {entry['fp32']:.4f}\n\n{table(['width', *methods], rows)}")
    return "\n\n".join(parts)


def reached(row: Mapping[str, Any] | None) -> str:
    """Return a value, a refusal, or that there is none."""
    return "" if row is None else "refused" if "refused" in row else f"{row['value']:.4f}"


def packing(found: Mapping[str, Any]) -> str:
    """Padding-free execution: a batch of BERT-base and a file of sentences on MiniLM."""
    bert, minilm = found["bert-base"], found["minilm"]
    rows = [
        [run["name"], f"{run['latency_ms']['p50']:.0f}", speedup(run["speedup"]) if run["speedup"] else "1"]
        for run in bert["runs"]
        if run["latency_ms"]
    ]
    sentences = [
        [run["name"], f"{run['sentences_per_second']:.0f}", f"{run['speedup']['ratio']:.2f}"] for run in minilm["runs"]
    ]
    return "\n\n".join(
        (
            f"BERT-base, batch 16, length 256, {bert['tokens_kept']:.0%} of the tokens are no padding",
            table(["system", "ms", "times as fast as ours padded"], rows),
            f"MiniLM, {minilm['sentences']} sentences in batches of {minilm['batch']}, {minilm['tokens_kept']:.0%} of "
            "the tokens are no padding",
            table(["system", "sentences per second", "times as fast as ours padded"], sentences),
        )
    )


def lengths(found: Mapping[str, Any]) -> str:
    """Attention of every kind against length."""
    columns = sorted({run["length"] for run in found["runs"]})
    names = list(dict.fromkeys(run["name"] for run in found["runs"]))
    p50 = {
        (run["name"], run["length"]): run["latency_ms"]["p50"] for run in found["runs"] if run["latency_ms"] is not None
    }
    rows = [[name, *(milliseconds(p50[name, n]) if (name, n) in p50 else "fails" for n in columns)] for name in names]
    return "Milliseconds of one layer's token mixing, by length; `xformopt report` draws them.\n\n" + table(
        ["", *(f"{length:,}" for length in columns)], rows
    )


def linearization(found: Mapping[str, Any]) -> str:
    """Linear attention on trained tasks, before and after recovery; and what the gate of lengths says."""
    parts = []
    for name, entry in found["models"].items():
        about = (
            f"`{name}` on `{entry['task']}` ({entry['metric']}): {entry['original']:.4f}, the best trivial predictor "
            f"{entry['trivial']:.4f}"
        )
        details = [detail for detail in entry["original_details"] if "share" not in detail]
        about += "".join(f"; {detail} {entry['original_details'][detail]:.4f}" for detail in details)
        rows = [
            [method, *["refused"] * (4 + len(details))]
            if "refused" in row
            else [
                method,
                str(row["layers"]),
                *(f"{row[when]:.4f}" for when in ("before", "after")),
                f"{row['margin_after']:.0%}",
                *(f"{row['details_after'][detail]:.4f}" for detail in details),
            ]
            for method, row in entry["methods"].items()
        ]
        told = [
            "; ".join((f"- `{row['pass']}`, {row['at']}: {row['layers']} layers", *row["refusals"]))
            for row in entry["gate"]
        ]
        columns = ["method", "layers", "untrained", "recovered", "margin kept", *details]
        parts += [about, table(columns, rows), "\n".join(told)]
    return "\n\n".join(parts)


def sparsification(found: Mapping[str, Any]) -> str:
    """A part of attention: what is left to compute, what it reaches and how fast it is."""
    parts = []
    for name, entry in found["models"].items():
        about = f"`{name}`"
        if "exact" in entry:
            about += f" on `{entry['task']}` ({entry['metric']}, {entry['count']} items): exact {entry['exact']:.4f}"
        lengths = list(dict.fromkeys(length for row in entry["techniques"].values() for length in row.get("timed", ())))
        rows = []
        for technique, row in entry["techniques"].items():
            if technique == "exact" or "refused" in row:
                continue
            reached = f"{row['value']:.4f}" if "value" in row else f"{row['distance']:.4f}" if "distance" in row else ""
            times = [speedup(row.get("timed", {}).get(length, {}).get("speedup")) for length in lengths]
            rows.append([technique, f"{row['flops_left']:.0%}", reached, *times])
        columns = ["technique", "FLOPs left", "reached", *(f"times as fast at {length} tokens" for length in lengths)]
        refused = {row["refused"]: label for label, row in entry["techniques"].items() if "refused" in row}
        parts += [about, table(columns, rows), "\n".join(f"- {label}: {why}" for why, label in refused.items())]
    return "\n\n".join(part for part in parts if part)


def tvm(found: Mapping[str, Any]) -> str:
    """TVM's target beside ONNX Runtime's."""
    parts = []
    for key, what in (
        ("p50_over_ort_cpu", "Median latency over that of `ort-cpu`, of the exact program."),
        ("int8_p50_over_ort_cpu_int8", "The same of the program in int8, over `ort-cpu` in int8."),
    ):
        entries = {name: entry[key] for name, entry in found.items() if key in entry}
        if entries:
            rows = [[name, *(f"{ratio:.2f}" for ratio in ratios.values())] for name, ratios in entries.items()]
            parts += [what, table(["model", *next(iter(entries.values()))], rows)]
    return "\n\n".join(parts)


def multiplication_free(found: Mapping[str, Any]) -> str:
    """What layers without multiplications cost, save and lose."""
    parts, entries = [], found["parts"]
    if (accuracy := entries.get("accuracy on digits")) is not None:
        rows = [[form, f"{entry['value']:.4f}"] for form, entry in accuracy.items()]
        parts += ["Every layer in one form: accuracy on `digits`.", table(["form", "accuracy"], rows)]
    for part, sizes in (("one layer", "rows, inputs, outputs"), ("one attention", "tokens, heads, width")):
        if part not in entries:
            continue
        parts.append(f"{part.capitalize()} ({sizes}): median, ms, on two threads, and its arithmetic in microjoules.")
        rows = []
        for entry in entries[part]["shapes"]:
            for run in entry["bench"]["runs"]:
                form = run["name"].rpartition(" ")[0]
                taken = "failed" if run["error"] else milliseconds(run["latency_ms"]["p50"])
                label = f"{' x '.join(map(str, entry[sizes]))}, {run['name']}"
                rows.append([label, taken, f"{entry['microjoules'][form]:.1f}"])
        parts.append(table(["layer", "p50, ms", "uJ"], rows))
    if len(parts) > 2:
        parts.append(f"Energy: {found['energy']}; {found['formula']}.")
    return "\n\n".join(parts)


def retraining(found: Mapping[str, Any]) -> str:
    """Models that were trained again from nothing."""
    rows = [
        [
            name,
            entry["task"],
            str(sum(fold["items"] for fold in entry["folds"])),
            f"{entry['stored']:.4f}",
            f"{entry['again']:.4f}",
            f"{entry['tolerance']:.4f}",
        ]
        for name, entry in found["models"].items()
    ]
    columns = ["model", "task", "items", "checkpoint", "trained again", "tolerance"]
    return "`tools/train.py NAME --check`, all folds, one thread.\n\n" + table(columns, rows)


def reconstruction(found: Mapping[str, Any]) -> str:
    """Block-wise reconstruction."""
    rows = [
        [name, f"{entry['seconds']:.0f}", f"{entry['relative_l2']:.4f}"] for name, entry in found["methods"].items()
    ]
    about = f"{found['model']}, 4-bit weights, {found['samples']} random images, {found['threads']} threads"
    return f"{about}.\n\n" + table(["rounding", "seconds", "relative L2 on other images"], rows)


SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "reduction": ("Doing less", reduction),
    "low-bit": ("Few bits", low_bit),
    "reconstruction": ("Weights rounded as training finds", reconstruction),
    "packing": ("Padding-free execution", packing),
    "lengths": ("Attention against length", lengths),
    "linearize": ("Linear attention on tasks", linearization),
    "sparsify": ("A part of attention", sparsification),
    "tvm": ("TVM", tvm),
    "retraining": ("Trained again", retraining),
    "multiplication-free": ("Layers without multiplications", multiplication_free),
}


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    parts = ["# Results", "Written by `tools/summarize.py` from the JSON beside it; the programs that measure say how."]
    for name, (title, describe) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts += [f"## {title}", describe(json.loads(path.read_text()))]
    (RESULTS / "README.md").write_text("\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n")


if __name__ == "__main__":
    main()
