"""Fill the generated parts of README.md: the tables of results and the IR of one layer, before and after.

python tools/readme.py           rewrites README.md from tools/results/{exact,int8}-*.json and MiniLM
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import xformopt as xo
from xformopt.program import Program
from xformopt.program.text import format_node, value_names

ROOT = Path(__file__).parent.parent
NAMES = {
    "minilm": "MiniLM-L6, 1x128",
    "bert-base": "BERT-base, 1x128",
    "vit-b16": "ViT-B/16, 1x3x224x224",
    "deit-s": "DeiT-S, 1x3x224x224",
    "gpt2": "GPT-2, 1x256",
    "llama-12": "Llama-style, 12 layers, GQA, 1x256",
}
COLUMNS = (
    "eager",
    "onnxruntime torch export",
    "onnxruntime optimizer",
    "openvino dynamic",
    "openvino static",
    "xformopt ort-cpu",
)
INT8_COLUMNS = {
    "fp32, xformopt exact": ("xformopt exact",),
    "onnxruntime quantize_dynamic": ("onnxruntime",),
    "openvino with nncf, dynamic": ("nncf openvino dynamic",),
    "openvino with nncf, static": ("nncf openvino static",),
    "xformopt int8": ("xformopt int8",),
    "xformopt int8-static": ("xformopt int8 static",),
}
_LAYER = "encoder.layer.0.attention"


def results_table() -> str:
    """Return the table of medians, ours with the range of its ratio to the best peer."""
    lines = [
        "Median latency in ms, fp32, two threads, each system in a process of its own, rounds interleaved. Ours and "
        "the dynamic peers take any batch and length; `openvino static` is reshaped to the measured one.",
        "",
        "| model | " + " | ".join(COLUMNS) + " | ours / best ONNX Runtime | ours / best OpenVINO |",
        "|---|" + "---:|" * (len(COLUMNS) + 2),
    ]
    machine = ""
    for name, title in NAMES.items():
        path = ROOT / "tools" / "results" / f"exact-{name}.json"
        if not path.exists():
            continue
        report = json.loads(path.read_text())
        machine = f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
        p50 = {run["name"]: run["latency_ms"]["p50"] for run in report["runs"] if run["latency_ms"]}
        cells = [f"{p50[column]:.1f}" if column in p50 else "fails" for column in COLUMNS]
        rounds = {run["name"]: run["round_p50_ms"] for run in report["runs"] if run["latency_ms"]}
        ratios = [f"{best_ratio(rounds, peer):.2f}" for peer in ("onnxruntime", "openvino")]
        lines.append(f"| {title} | " + " | ".join([*cells, *ratios]) + " |")
    closing = (
        f"Measured on {machine} by `tools/measure_exact.py`. A ratio below 1 means ours is faster; it is the median "
        "over rounds of the ratio within a round, since the speed of the machine drifts."
    )
    return "\n".join([*lines, "", closing])


def int8_table() -> str:
    """Return the table of medians in int8 and how far each is from the original."""
    lines = [
        "Median latency in ms, and in brackets the relative L2 to the original in fp32, on the same inputs; all that "
        "calibrate saw the same 16 samples. `int8` needs no data, `int8-static` is calibrated.",
        "",
        "| model | " + " | ".join(INT8_COLUMNS) + " |",
        "|---|" + "---:|" * len(INT8_COLUMNS),
    ]
    for name, title in NAMES.items():
        path = ROOT / "tools" / "results" / f"int8-{name}.json"
        if path.exists():
            runs = json.loads(path.read_text())["runs"]
            cells = [int8_cell(runs, *wanted) for wanted in INT8_COLUMNS.values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    closing = "Measured by `tools/measure_int8.py` as above; all models but MiniLM have random weights."
    return "\n".join([*lines, "", closing])


def int8_cell(runs: list[dict[str, Any]], wanted: str) -> str:
    """Return latency and loss of a system, of a peer with several variants those of the fastest."""
    found = [
        run for run in runs if run["latency_ms"] and (run["name"] == wanted or run["name"].startswith(f"{wanted} "))
    ]
    exact = [run for run in found if run["name"] == wanted] or found
    if not exact:
        return "fails"
    best = min(exact, key=lambda run: float(run["latency_ms"]["p50"]))
    loss = best["fidelity"]["relative_l2"]
    return f"{best['latency_ms']['p50']:.1f}" + (f" ({loss:.3f})" if loss > 1e-4 else "")


def best_ratio(rounds: dict[str, list[float]], peer: str) -> float:
    """Return our time over that of the best run of a peer: the median over rounds, which pairs what ran together."""
    ours = rounds["xformopt ort-cpu"]
    return max(
        statistics.median(mine / theirs for mine, theirs in zip(ours, values, strict=True))
        for name, values in rounds.items()
        if name.startswith(peer)
    )


def layer_text(program: Program) -> str:
    """Return the lines of the first attention layer, parameters shortened to their last parts."""
    values = value_names(program)
    wanted = [n for n in program.nodes() if _LAYER in str(n.meta.get("path", "")) and "output" not in n.meta["path"]]
    text = "\n".join(format_node(program, node, values) for node in wanted)
    text = re.sub(r"%model\.encoder\.layer\.0\.attention\.", "%", text)
    return "```\n" + re.sub(r"  # model\.encoder\.layer\.0\.", "  # ", text) + "\n```"


def fill(text: str, part: str, content: str) -> str:
    """Replace what stands between the markers of a part."""
    pattern = rf"(<!-- {part}: begin -->\n).*?(<!-- {part}: end -->)"
    return re.sub(pattern, lambda found: found[1] + content + "\n" + found[2], text, flags=re.DOTALL)


def main() -> None:
    """Rewrite README.md."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    captured = xo.capture("minilm")
    optimized = xo.Pipeline.recipe("exact").run(captured).program
    path = ROOT / "README.md"
    text = path.read_text()
    parts = {
        "results": results_table(),
        "int8": int8_table(),
        "captured": layer_text(captured),
        "optimized": layer_text(optimized),
    }
    for part, content in parts.items():
        text = fill(text, part, content)
    path.write_text(text)


if __name__ == "__main__":
    main()
