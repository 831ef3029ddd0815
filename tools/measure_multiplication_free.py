"""What linear layers without multiplications cost and save: products by shifts beside int8 and fp32.

    python tools/measure_multiplication_free.py [--kernels] [--accuracy]

writes tools/results/multiplication-free.json.  Three parts: the time of one linear layer in each form on this machine,
one run on two threads, rounds interleaved, tiles tuned; an estimate of the energy of its arithmetic; and the accuracy
on ``digits``, all five folds, with every linear layer in that form, without training.  A processor has multipliers
whether they are used or not, so that time says what the forms cost here, and energy what a circuit made for them would
save.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from measure_low_bit import Reached, cases, describe, run_passes
from results_file import FOLDER, ResultsFile

import xformopt as xo
from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.passes import parse_pass
from xformopt.program import Program

SOURCE = "Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9: 45 nm, 0.9 V, picojoules of one operation"
PICOJOULES = {"int8 multiply": 0.2, "int32 add": 0.1, "fp32 multiply": 3.7, "fp32 add": 0.9}
FORMULA = (
    "energy = sum of operations times their energy, over rows x inputs x outputs multiply-adds and what activations "
    "and outputs need besides; memory, clock and control are left out, and are most of what a processor spends"
)
RESULTS = ResultsFile(
    FOLDER / "multiplication-free.json",
    "xformopt/multiplication-free/1",
    "parts",
    {"energy": SOURCE, "formula": FORMULA},
)
# of MiniLM at batch 1, length 128: attention's projections, and the two of the feed-forward part
SHAPES = ((128, 384, 384), (128, 384, 1536), (128, 1536, 384))
# the form of a linear layer, and the pass that makes it
FORMS = {"fp32": None, "int8": "quantize-dynamic", "shift": "quantize-shift{layers=all}"}
THREADS = 2
TUNING_SECONDS = 60.0


def picojoules(form: str, rows: int, inputs: int, outputs: int) -> float:
    """Return the energy of the arithmetic of one product, as its kernel does it."""
    one, activations, results = rows * inputs * outputs, rows * inputs, rows * outputs
    e = PICOJOULES
    if form == "fp32":
        return one * (e["fp32 multiply"] + e["fp32 add"])
    if form == "int8":
        # a code is a product and a sum, as are an output's zero point, its scale (two products) and its bias
        codes = activations * (e["fp32 multiply"] + e["fp32 add"])
        outcome = results * (2 * e["fp32 multiply"] + e["fp32 add"] + e["int32 add"])
        return one * (e["int8 multiply"] + e["int32 add"]) + codes + outcome
    # exponents are added as integers, terms as floats
    return one * (e["int32 add"] + e["fp32 add"])


def layer(rows: int, inputs: int, outputs: int) -> Program:
    """Return one linear layer."""
    return Program.parse(
        f'program "layer" lifted\n'
        f"input %x: f32[1,{rows},{inputs}]\n"
        f"param %w: f32[{outputs},{inputs}]\n"
        f"param %b: f32[{outputs}]\n"
        f"%y: f32[1,{rows},{outputs}] = xf.linear(%x, %w, %b)\n"
        f"return y=%y"
    )


def measure_layer(rows: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    """Return time and energy of a layer in every form, and of ONNX Runtime's beside them."""
    plain = layer(rows, inputs, outputs)
    candidates = []
    with tempfile.TemporaryDirectory() as folder:
        for form, text in FORMS.items():
            program = plain if text is None else xo.Pipeline([parse_pass(text)]).run(plain).program
            # ONNX Runtime has no product by shifts: there the weights are multiplied with
            for target in ("tvm-cpu", "ort-cpu") if form != "shift" else ("tvm-cpu",):
                name = f"{form} {target}"
                artifact = xo.lower(program, target, threads=THREADS, tuning_seconds=TUNING_SECONDS, captured=plain)
                artifact.save(Path(folder) / name, program=False)
                candidates.append(Candidate(name, target, Path(folder) / name, max_relative_l2=1e9))
        arrays = {name: value.numpy() for name, value in plain_inputs(plain).items()}
        reference = {name: value.detach().numpy() for name, value in plain.run(plain_inputs(plain)).items()}
        settings = BenchSettings(threads=THREADS, rounds=rounds, over="fp32 tvm-cpu", profile_rounds=0)
        report = run_bench(candidates, arrays, reference, settings=settings, source="one linear layer")
    bench = report.to_dict()
    for run in bench["runs"]:
        # thousands, of which the medians and intervals are beside them
        del run["samples_ms"]
    energy = {form: picojoules(form, rows, inputs, outputs) / 1e6 for form in FORMS}
    return {
        "rows, inputs, outputs": [rows, inputs, outputs],
        "microjoules": {form: round(value, 3) for form, value in energy.items()},
        "energy_over_fp32": {form: round(value / energy["fp32"], 4) for form, value in energy.items()},
        "bench": bench,
    }


def plain_inputs(program: Program) -> dict[str, Any]:
    """Return the layer's input, drawn from the seed 0."""
    from xformopt.lowering.reference import reference_inputs

    return reference_inputs(program)


def measure_accuracy() -> dict[str, Any]:
    """Return what every form reaches on the digits, beside fp32, over the same items."""
    folds = cases("digits")
    fp32 = Reached([fold.eager for fold in folds])
    found: dict[str, Any] = {"fp32": {"value": fp32.value, "count": len(fp32.items)}}
    passes = {
        "int8": FORMS["int8"],
        "shift": FORMS["shift"],
        "shift, 5 bits": "quantize-shift{layers=all,exponent_bits=5}",
    }
    for form, text in passes.items():
        assert text is not None
        found[form] = describe([text], run_passes("digits", folds, [text]), fp32, None)
    return found


def main() -> None:
    """Measure the parts asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    # the pool of threads is made once for all functions that are timed here
    os.environ["TVM_NUM_THREADS"] = str(THREADS)
    every = not options.kernels and not options.accuracy
    if options.accuracy or every:
        RESULTS.put("accuracy on digits", measure_accuracy())
    if options.kernels or every:
        RESULTS.put("one layer", {"shapes": [measure_layer(*shape, options.rounds) for shape in SHAPES]})


if __name__ == "__main__":
    main()
