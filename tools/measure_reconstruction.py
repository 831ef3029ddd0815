"""Measure how far ten minutes of block-wise reconstruction get on DeiT-S, on two threads with 128 images.

    python tools/measure_reconstruction.py      writes tools/results/reconstruction.json

Weights of 4 bits, rounded to nearest and rounded as training finds (AdaRound, block by block).  The weights are
random, as no pretrained ones can be had: the time is what a real model takes, and the relative L2 of the output, on
images that were not seen, says that the training works, not what accuracy it keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE, dynamic_axes

import xformopt as xo
from xformopt.measure.machine import describe_machine
from xformopt.passes import parse_pass
from xformopt.pipeline import Context, Pipeline
from xformopt.program import example_sizes, sample_inputs

RESULTS = Path(__file__).parent / "results" / "reconstruction.json"
MODEL, BATCH, SAMPLES, THREADS = "deit-s", 32, 128, 2
METHODS = {"nearest": "quantize-weights{bits=4,group=32}", "adaround": "adaround{bits=4,group=32,minutes=10}"}


def main() -> None:
    """Run both and compare what comes out."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(THREADS)
    model, inputs = REFERENCE[MODEL][0]()
    program = Pipeline.recipe("exact").run(xo.capture(model, inputs, dynamic_axes(MODEL, inputs))).program
    sizes = {**example_sizes(program), "batch": BATCH}
    samples = [sample_inputs(program, sizes, seed=seed) for seed in range(SAMPLES // BATCH)]
    unseen = sample_inputs(program, sizes, seed=SAMPLES)
    expected = program.run(unseen)
    rows = {}
    for label, text in METHODS.items():
        begin = time.perf_counter()
        result = parse_pass(text).run(program, Context(calibration=samples))
        seconds = time.perf_counter() - begin
        found = result.program.run(unseen)
        error = max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())
        rows[label] = {"pass": text, "seconds": seconds, "relative_l2": error, "notes": list(result.notes)}
        print(label, rows[label], flush=True)
    setting = {"model": MODEL, "samples": SAMPLES, "batch": BATCH, "threads": THREADS}
    report = {"schema": "xformopt/reconstruction/1", "machine": vars(describe_machine()), **setting, "methods": rows}
    RESULTS.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
