"""What layers without multiplications cost and save: shifts, tables and codes beside int8 and fp32.

    python tools/measure_multiplication_free.py [--layers] [--attention] [--accuracy]

writes tools/results/multiplication-free.json.  Three parts: the time of one linear layer, and of one attention, in each
form on this machine, one run on two threads, rounds interleaved, tiles tuned; an estimate of the energy of their
arithmetic; and the accuracy on ``digits``, all five folds, with every layer in that form.  A processor has multipliers
whether they are used or not, so that time says what the forms cost here, and energy what a circuit made for them would
save.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from measure_low_bit import Reached, cases, describe, run_passes
from results_file import FOLDER, ResultsFile

import xformopt as xo
from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.kernels.log_attention.tvm import Levels, additions
from xformopt.lowering.reference import reference_inputs
from xformopt.passes import parse_pass
from xformopt.program import Program

SOURCE = "Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9: 45 nm, 0.9 V, picojoules of one operation"
PICOJOULES = {"int8 multiply": 0.2, "int32 add": 0.1, "fp32 multiply": 3.7, "fp32 add": 0.9}
FORMULA = (
    "energy = sum of operations times their energy, over all products of a layer and what activations and outputs need "
    "besides; exponentials, divisions, memory, clock and control are left out, and the last three are most of what a "
    "processor spends"
)
RESULTS = ResultsFile(
    FOLDER / "multiplication-free.json",
    "xformopt/multiplication-free/1",
    "parts",
    {"energy": SOURCE, "formula": FORMULA},
)
# of MiniLM at batch 1, length 128: attention's projections, and the two of the feed-forward part
LAYERS = ((128, 384, 384), (128, 384, 1536), (128, 1536, 384))
# tokens, heads and their width: MiniLM at length 128, DeiT-S, and ten times its length
ATTENTIONS = ((128, 12, 32), (197, 6, 64), (1970, 6, 64))
# the form of a linear layer, and the pass that makes it; None: it is written as it is
FORMS = {"fp32": None, "int8": "quantize-dynamic", "shift": "quantize-shift{layers=all}", "hashed tables": None}
TABLE_BITS = 4
CODE_BITS = 16
LEVELS = Levels(bits=4, numerator=52, denominator=37, round_table=True, flush=True)
FLOAT, LOG, FLOAT_CODES, CODES = "softmax", "4-bit logarithmic weights", "codes as floats", "codes as bits"
# what is judged on digits: the passes behind the exact recipe
JUDGED = {
    "int8": ("quantize-dynamic",),
    "shift": ("quantize-shift{layers=all}",),
    "shift, 5 bits": ("quantize-shift{layers=all,exponent_bits=5}",),
    LOG: ("adalog{weight_bits=8,activation_bits=4}", "fuse-log-attention"),
    "hashed tables": ("tabulate-linears",),
    "hashed tables, then recovery": ("tabulate-linears", "recover-accuracy{minutes=1}"),
    CODES: ("linearize-eco{force=true,max_error=99,minutes=1}",),
    "codes as bits, then recovery": ("linearize-eco{force=true,max_error=99,minutes=1}", "recover-accuracy{minutes=1}"),
}
THREADS = 2
TUNING_SECONDS = 60.0


def layer_energy(form: str, rows: int, inputs: int, outputs: int) -> float:
    """Return the energy in picojoules of the arithmetic of one product, as its kernel does it."""
    one, activations, results = rows * inputs * outputs, rows * inputs, rows * outputs
    e = PICOJOULES
    if form == "fp32":
        return one * (e["fp32 multiply"] + e["fp32 add"])
    if form == "int8":
        # a code is a product and a sum, as are an output's zero point, its scale (two products) and its bias
        codes = activations * (e["fp32 multiply"] + e["fp32 add"])
        outcome = results * (2 * e["fp32 multiply"] + e["fp32 add"] + e["int32 add"])
        return one * (e["int8 multiply"] + e["int32 add"]) + codes + outcome
    if form == "hashed tables":
        # a channel's share of p is two products and a sum; a table and output, one product and one sum
        hashing = activations * (2 * e["fp32 multiply"] + e["fp32 add"] + e["int32 add"])
        return hashing + one / TABLE_BITS * (e["fp32 multiply"] + e["fp32 add"]) + results * e["fp32 add"]
    # exponents are added as integers, terms as floats
    return one * (e["int32 add"] + e["fp32 add"])


def attention_energy(form: str, tokens: int, heads: int, width: int) -> float:
    """Return the same of one attention; of codes, without their making."""
    e = PICOJOULES
    product = e["fp32 multiply"] + e["fp32 add"]
    pairs = heads * tokens**2
    if form == FLOAT:
        return pairs * 2 * width * product + pairs * product
    if form == LOG:
        # logits and their codes as before; a value is added to the sum of its code, and these are shifted at the end
        summed = heads * tokens * width * additions(LEVELS) * (e["int32 add"] + e["fp32 add"])
        return pairs * (width + 1) * product + pairs * width * e["fp32 add"] + summed
    if form == FLOAT_CODES:
        return 2 * heads * tokens * (CODE_BITS + 1) * (width + 1) * product
    # four bits are one sum; the tables between keys and queries take two sums for each bit and pattern
    groups = CODE_BITS // 4
    tables = heads * groups * 2 * 4 * 16 * (width + 1)
    return (2 * heads * tokens * groups * (width + 1) + tables) * e["fp32 add"]


def layer(form: str, rows: int, inputs: int, outputs: int) -> Program:
    """Return one linear layer; tables hold what parsing draws, as their values do not change the time."""
    weight, use = f"f32[{outputs},{inputs}]", "xf.linear(%x, %w, %b)"
    if form == "hashed tables":
        weight = f"f32[{inputs // TABLE_BITS},{2**TABLE_BITS},{outputs}]"
        use = "xf.memory_linear(%x, %w, %b) {temperature=1.0}"
    return Program.parse(
        f'program "layer" target\n'
        f"input %x: f32[1,{rows},{inputs}]\n"
        f"param %w: {weight}\n"
        f"param %b: f32[{outputs}]\n"
        f"%y: f32[1,{rows},{outputs}] = {use}\n"
        f"return y=%y"
    )


def attention(form: str, tokens: int, heads: int, width: int) -> Program:
    """Return one attention of queries, keys and values; codes are the signs of the first channels of a head."""
    size, packed = f"f32[1,{tokens},{heads * width}]", heads * CODE_BITS // 8
    lines = [f"input %{name}: {size}" for name in "qkv"]
    if form in (FLOAT_CODES, CODES):
        for name in "qk":
            shape = f"[1,{tokens},{heads},{CODE_BITS}]"
            lines += [
                f"%{name}u: f32[1,{tokens},{heads},{width}] = aten.unflatten.int(%{name}) "
                f"{{dim=2, sizes=[{heads}, {width}]}}",
                f"%{name}s: f32{shape} = aten.slice.Tensor(%{name}u) {{dim=3, start=0, end={CODE_BITS}}}",
                f"%{name}b: bool{shape} = aten.ge.Scalar(%{name}s) {{other=0}}",
            ]
            if form == CODES:
                lines += [
                    f"%{name}p: u8[1,{tokens},{heads},{CODE_BITS // 8}] = xf.pack_bits(%{name}b)",
                    f"%{name}c: u8[1,{tokens},{packed}] = aten.flatten.using_ints(%{name}p) {{start_dim=2}}",
                ]
            else:
                wide = f"f32[1,{tokens},{heads},{CODE_BITS + 1}]"
                lines += [
                    f"%{name}f: f32{shape} = aten._to_copy(%{name}b) {{dtype=f32}}",
                    f"%{name}t: f32{shape} = aten.mul.Scalar(%{name}f) {{other=2.0}}",
                    f"%{name}o: f32{shape} = aten.sub.Scalar(%{name}t) {{other=1.0}}",
                    f"%{name}w: {wide} = aten.constant_pad_nd(%{name}o) {{pad=[0, 1], value={CODE_BITS**0.5}}}",
                    f"%{name}c: f32[1,{tokens},{heads * (CODE_BITS + 1)}] = aten.flatten.using_ints(%{name}w) "
                    f"{{start_dim=2}}",
                ]
    options = f"heads={heads}, kv_heads={heads}, scale={width**-0.5}"
    levels = ", ".join(f"{name}={str(value).lower()}" for name, value in vars(LEVELS).items())
    calls = {
        FLOAT: f"xf.attention(%q, %k, %v) {{{options}}}",
        LOG: f"xf.log_attention(%q, %k, %v, %one) {{{options}, {levels}}}",
        FLOAT_CODES: f"xf.linear_attention(%qc, %kc, %v) {{heads={heads}, feature=given}}",
        CODES: f"xf.hamming_attention(%qc, %kc, %v) {{heads={heads}, bits={CODE_BITS}}}",
    }
    if form == LOG:
        lines.append("param %one: f32[]")
    text = "\n".join(['program "attention" target', *lines, f"%y: {size} = {calls[form]}", "return y=%y"])
    program = Program.parse(text)
    if form == LOG:
        program.parameters["one"] = program.parameters["one"].new_ones(())
    return program


def measure(
    programs: Mapping[str, Program], energy: Callable[[str], float], rounds: int, targets: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return time and energy of every form, the first of which the others are held against."""
    first = next(iter(programs))
    plain, candidates = programs[first], []
    with tempfile.TemporaryDirectory() as folder:
        for form, program in programs.items():
            for target in targets.get(form, ("tvm-cpu", "ort-cpu")):
                name = f"{form} {target}"
                artifact = xo.lower(program, target, threads=THREADS, tuning_seconds=TUNING_SECONDS, captured=plain)
                artifact.save(Path(folder) / name, program=False)
                candidates.append(Candidate(name, target, Path(folder) / name, max_relative_l2=1e9))
        inputs = reference_inputs(plain)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        reference = {name: value.detach().numpy() for name, value in plain.run(inputs).items()}
        settings = BenchSettings(threads=THREADS, rounds=rounds, over=f"{first} tvm-cpu", profile_rounds=0)
        bench = run_bench(candidates, arrays, reference, settings=settings, source="one layer").to_dict()
    for run in bench["runs"]:
        # thousands, of which the medians and intervals are beside them
        del run["samples_ms"]
    spent = {form: energy(form) / 1e6 for form in programs}
    return {
        "microjoules": {form: round(value, 3) for form, value in spent.items()},
        f"energy_over_{first}": {form: round(value / spent[first], 4) for form, value in spent.items()},
        "bench": bench,
    }


def measure_layer(rows: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    """Return time and energy of a linear layer in every form."""
    programs = {}
    for form, text in FORMS.items():
        plain = layer(form, rows, inputs, outputs)
        programs[form] = plain if text is None else xo.Pipeline([parse_pass(text)]).run(plain).program
    # ONNX Runtime has no product by shifts: there the weights are multiplied with
    found = measure(programs, lambda form: layer_energy(form, rows, inputs, outputs), rounds, {"shift": ("tvm-cpu",)})
    return {"rows, inputs, outputs": [rows, inputs, outputs], **found}


def measure_attention(tokens: int, heads: int, width: int, rounds: int) -> dict[str, Any]:
    """Return time and energy of an attention in every form; none here computes one in 8-bit integers."""
    programs = {form: attention(form, tokens, heads, width) for form in (FLOAT, LOG, FLOAT_CODES, CODES)}
    # what ONNX Runtime is given are the steps in float, which say nothing of the forms
    only = dict.fromkeys((LOG, CODES), ("tvm-cpu",))
    found = measure(programs, lambda form: attention_energy(form, tokens, heads, width), rounds, only)
    return {"tokens, heads, width": [tokens, heads, width], **found}


def measure_accuracy() -> dict[str, Any]:
    """Return what every form reaches on the digits, beside fp32, over the same items."""
    folds = cases("digits")
    fp32 = Reached([fold.eager for fold in folds])
    found: dict[str, Any] = {"fp32": {"value": fp32.value, "count": len(fp32.items)}}
    for form, passes in JUDGED.items():
        found[form] = describe(passes, run_passes("digits", folds, passes), fp32, None)
    return found


def main() -> None:
    """Measure the parts asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    # the pool of threads is made once for all functions that are timed here
    os.environ["TVM_NUM_THREADS"] = str(THREADS)
    every = not (options.layers or options.attention or options.accuracy)
    if options.accuracy or every:
        RESULTS.put("accuracy on digits", measure_accuracy())
    if options.layers or every:
        RESULTS.put("one layer", {"shapes": [measure_layer(*shape, options.rounds) for shape in LAYERS]})
    if options.attention or every:
        RESULTS.put("one attention", {"shapes": [measure_attention(*shape, options.rounds) for shape in ATTENTIONS]})


if __name__ == "__main__":
    main()
