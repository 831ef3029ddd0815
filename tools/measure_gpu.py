"""Check and measure the Triton kernels and whole models on an NVIDIA GPU, in sections that can be resumed.

    python tools/measure_gpu.py [--section NAME ...] [--budget-minutes 7] [--again] [--output FILE]

It needs torch 2.11 or later with CUDA, Triton 3.6, Python 3.12 and this repository, not installed: nothing of ONNX, no
transformers, no weights.  It writes tools/results/gpu.json entry by entry; called again, it goes on where it stopped,
so a lease of minutes is enough.  What failed is written as an error and tried anew.  The sections, in order:

    machine     copy bandwidth and the rate of products, measured: the limits that kernels are compared with
    numerics    every kernel against float64 (relative L2 within 1e-5 in float32, 1e-2 in bfloat16), twice the same
    rows        norms, rotary embedding, gates, activations, merging, linear layers: share of the limits, torch.compile
    attention   512 to 32,768 tokens, heads of 64 and 128, beside torch's own attention and torch.compile
    recurrent   gated linear attention and its kin beside flash attention and, where installed, flash-linear-attention
    variants    attention over packed sequences, over allowed blocks and with entmax, beside torch's own
    models      BERT-base on unequal lengths: packed, padded, torch.compile, torch's nested tensors; ViT-B, GPT-2, and
                ViT-B with merged tokens

Times are medians between device events around graphs of calls.  Without an NVIDIA GPU the file says so and stays empty.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
import gpu_setup  # noqa: F401 (before anything of xformopt)

# isort: split
import torch
from gpu_clock import measure_copy, measure_products
from gpu_file import NO_GPU, GpuFile, Job, run_jobs
from gpu_operands import Peaks

from xformopt.kernels.triton_form import Tile, Trial
from xformopt.lowering.triton_session import missing_gpu
from xformopt.lowering.triton_tuning import choose_tiles, describe_gpu
from xformopt.measure.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "gpu.json"
SECTIONS = ("machine", "numerics", "rows", "attention", "recurrent", "variants", "models")


def machine_jobs() -> Iterable[Job]:
    """Yield the limits of the machine."""
    yield Job("copy", lambda: {"bytes_per_second": measure_copy()})
    yield Job("products in bf16", lambda: {"flops_per_second": measure_products(torch.bfloat16)})
    yield Job("products in fp32", lambda: {"flops_per_second": measure_products(torch.float32)})


def peaks_of(file: GpuFile) -> Peaks:
    """Return the limits that the file states.

    Raises:
        ValueError: they were not measured yet.

    """
    found = file.read()["entries"].get("machine", {})
    try:
        return Peaks(found["copy"]["bytes_per_second"], found["products in bf16"]["flops_per_second"])
    except KeyError as error:
        raise ValueError("The machine was not measured yet. Run --section machine first.") from error


def tuned(trials: Mapping[str, Trial]) -> dict[str, Tile]:
    """Choose tiles on this GPU, or recall them."""
    tiles, tried = choose_tiles(trials, progress=lambda *_: None)
    for one in tried:
        print("tiles", one.key, one.note, flush=True)
    return tiles


def jobs_of(section: str, file: GpuFile) -> Iterable[Job]:
    """Return the jobs of a section; what it needs is imported here, so that one section cannot break another."""
    if section == "machine":
        return machine_jobs()
    if section == "numerics":
        from gpu_kernels import numeric_jobs

        return numeric_jobs(tuned)
    peaks = peaks_of(file)
    if section == "rows":
        from gpu_kernels import row_jobs

        return row_jobs(peaks, tuned)
    if section == "attention":
        from gpu_lengths import attention_jobs

        return attention_jobs(peaks, tuned)
    if section == "recurrent":
        from gpu_lengths import recurrent_jobs

        return recurrent_jobs(peaks)
    if section == "variants":
        from gpu_variants import variant_jobs

        return variant_jobs(peaks, tuned)
    from gpu_models import model_jobs

    return model_jobs(tuned)


def run(
    file: GpuFile, sections: Iterable[str], minutes: float, again: bool, clock: Callable[[], float] = time.monotonic
) -> bool:
    """Do what is not done of the sections; returns whether all is."""
    deadline = clock() + minutes * 60
    return all(
        run_jobs(file, section, jobs_of(section, file), deadline=deadline, again=again, clock=clock)
        for section in sections
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=SECTIONS)
    parser.add_argument("--budget-minutes", type=float, default=7.0)
    parser.add_argument("--again", action="store_true", help="measure what is in the file already")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    # read when the first kernel is: it is to run on the device
    os.environ.pop("TRITON_INTERPRET", None)
    file = GpuFile(options.output)
    if why_not := missing_gpu():
        written = file.say_there_is_no_gpu()
        print(f"{NO_GPU} ({why_not}.)" + ("" if written else f" {file.path} keeps the results it has."))
        return
    machine: dict[str, Any] = {**describe_machine().to_dict(), "gpu": describe_gpu()}
    file.start(machine)
    is_done = run(file, options.section or SECTIONS, options.budget_minutes, options.again)
    print("All is measured." if is_done else "Time is up: call again to go on.")


if __name__ == "__main__":
    main()
