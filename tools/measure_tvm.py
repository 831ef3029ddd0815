"""Measure the TVM target against ONNX Runtime: tvm-cpu untuned and tuned, and ort-cpu, in fp32 and in int8.

    python tools/measure_tvm.py [MODEL ...]         writes tools/results/tvm.json

One run on two threads for each model, rounds interleaved, each system in a process of its own, parity checked first.
Tuning starts from nothing and has five minutes at most.  For every kernel that is a product the file states its
GFLOP/s, from the profile of the tuned artifact, beside the peak that torch's matrix product reached on this machine.
In int8 both targets lower one program, that of the recipe int8, and are compared with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE, dynamic_axes

import xformopt as xo
from xformopt.analysis import cost
from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.lowering import open_runner
from xformopt.lowering.artifact import Artifact
from xformopt.program import Program, example_sizes

RESULT = Path(__file__).parent / "results" / "tvm.json"
MODELS = ("minilm", "deit-s")
THREADS = 2
TUNING_SECONDS = 300.0
PROFILED = 10
LOWERED = (
    ("ort-cpu", "ort-cpu", 120.0),
    ("tvm-cpu untuned", "tvm-cpu", None),
    ("tvm-cpu tuned", "tvm-cpu", TUNING_SECONDS),
)
RECIPES = {"exact": "", "int8": " int8"}


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Build the three artifacts of one model and measure them in one run."""
    model, inputs = REFERENCE[name][0]()
    captured = xo.capture(model, inputs, dynamic_axes(name, inputs))
    counted = cost(captured, example_sizes(captured))
    candidates, tuning = [], {}
    for recipe, suffix in RECIPES.items():
        program = xo.Pipeline.recipe(recipe).run(captured).program
        # what int8 loses is told, and is no fault of the target
        about = (
            {"flops": counted.flops, "bytes_moved": counted.bytes} if recipe == "exact" else {"max_relative_l2": 1e9}
        )
        for plain, target, seconds in LOWERED:
            start, label = time.monotonic(), plain + suffix
            with own_cache(folder / "cache"):
                artifact = lower(program, captured, target, seconds)
            print(f"{name}: {label} lowered in {time.monotonic() - start:.0f} s", flush=True)
            artifact.save(folder / label, program=False)
            tuning[label] = [record.model_dump() for record in artifact.manifest.tuning]
            candidates.append(Candidate(label, target, folder / label, **about))
    reference = {key: value.numpy() for key, value in captured.run(inputs).items()}
    arrays = {key: value.numpy() for key, value in inputs.items()}
    del model, captured, program
    settings = BenchSettings(threads=THREADS, rounds=rounds, round_seconds=0.2, over="ort-cpu")
    report = run_bench(candidates, arrays, reference, settings=settings, source=name).to_dict()
    peaks = report["machine"]["peaks"]
    p50 = {run["name"]: run["latency_ms"]["p50"] for run in report["runs"] if run["latency_ms"]}
    return {
        "p50_over_ort_cpu": {label: round(p50[label] / p50["ort-cpu"], 3) for label, *_ in LOWERED},
        "int8_p50_over_ort_cpu_int8": {
            label: round(p50[f"{label} int8"] / p50["ort-cpu int8"], 3) for label, *_ in LOWERED
        },
        "kernels": kernels_of(folder / "tvm-cpu tuned", arrays, peaks["gflops"] if peaks else None),
        # the peak of integer products is not measured
        "int8_kernels": kernels_of(folder / "tvm-cpu tuned int8", arrays, None),
        "tuning": {"seconds_at_most": TUNING_SECONDS, "records": tuning["tvm-cpu tuned"]},
        "int8_tuning": {"seconds_at_most": TUNING_SECONDS, "records": tuning["tvm-cpu tuned int8"]},
        "bench": report,
    }


def lower(program: Program, captured: Program, target: str, seconds: float | None) -> Artifact:
    """Lower by measurement for as long as ``seconds``; None takes the defaults."""
    return xo.lower(
        program,
        target,
        measure=seconds is not None,
        tuning_seconds=seconds or 0.0,
        threads=THREADS,
        captured=captured,
    )


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Start from no answers of earlier runs."""
    before = os.environ.get("XFORMOPT_CACHE")
    os.environ["XFORMOPT_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("XFORMOPT_CACHE")
        if before is not None:
            os.environ["XFORMOPT_CACHE"] = before


def kernels_of(folder: Path, arrays: dict[str, Any], peak: float | None) -> list[dict[str, Any]]:
    """Return the rate of every product of an artifact; a profiled call includes how it is dispatched."""
    found = []
    for kernel in open_runner("tvm-cpu", folder, threads=THREADS).profile(arrays, PROFILED) or ():
        flops = flops_of(kernel.name)
        if flops is not None:
            gflops = flops * kernel.count / kernel.total_ms / 1e6
            share = round(gflops / peak, 3) if peak else None
            found.append({"name": kernel.name, "gflops": round(gflops, 1), "share_of_peak": share})
    return found


def flops_of(name: str) -> int | None:
    """Return the operations of one call of a kernel, whose name states its sizes; None where it is no product."""
    sizes = [int(part) for part in re.findall(r"(?<=_)\d+(?=_|$)", name)]
    if name.startswith(("matmul_", "matmul8_")):
        rows, inner, columns = sizes[:3]
        return 2 * rows * inner * columns
    if name.startswith("attention_"):
        batch, queries, keys, heads, _, width, value_width = sizes[:7]
        return 2 * batch * heads * queries * keys * (width + value_width)
    return None


def main() -> None:
    """Parse the models to measure and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    # the pool of threads is made once for all functions that are timed here
    os.environ["TVM_NUM_THREADS"] = str(THREADS)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder), options.rounds)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results[name]["p50_over_ort_cpu"], flush=True)


if __name__ == "__main__":
    main()
