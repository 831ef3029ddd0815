"""How far exact artifacts are from eager fp32: every output, several batches, lengths and paddings.

    python tools/measure_fidelity.py [MODEL ...]      writes tools/results/fidelity.json

Relative L2 on valid positions; the issue's bound is 1e-5.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE, dynamic_axes

import xformopt as xo
from xformopt.measure.machine import describe_machine
from xformopt.pipeline.numeric import relative_l2
from xformopt.program import Program, sample_inputs, valid_positions
from xformopt.program.sample import Padding

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
BATCHES = (1, 3)
LENGTHS = (1, 7, 128)
LONGEST = 2048


def deviations(name: str) -> list[dict[str, object]]:
    """Lower one model and compare it with the module itself at every shape."""
    model, inputs = REFERENCE[name][0]()
    program = xo.capture(model, inputs, dynamic_axes(name, inputs))
    result = xo.Pipeline.recipe("exact").run(program)
    artifact = xo.lower(result.program, measure=True)
    longest = min(REFERENCE[name][1] or 1, LONGEST)
    rows = []
    for batch in BATCHES:
        for length in dict.fromkeys((*LENGTHS, longest)) if REFERENCE[name][1] else (None,):
            for padding in ("none", "left", "right") if length not in (None, 1) else ("none",):
                sizes = {"batch": batch} | ({"length": length} if length else {})
                found = compare(model, program, artifact, sizes, padding)
                rows.append({"batch": batch, "length": length, "padding": padding, "relative_l2": found})
                print(name, rows[-1], flush=True)
    return rows


def compare(
    model: torch.nn.Module, program: Program, artifact: xo.Artifact, sizes: dict[str, int], padding: Padding
) -> dict[str, float]:
    """Return the relative L2 of every output."""
    inputs = sample_inputs(program, sizes, seed=1, padding=padding)
    with torch.no_grad():
        wanted = model(**inputs)
    have = artifact.run(**{key: value.numpy() for key, value in inputs.items()})
    found = {}
    for spec, node in zip(program.outputs, program.results, strict=True):
        valid = valid_positions(program, node.meta["val"], inputs)
        found[spec.name] = relative_l2(wanted[spec.name], torch.from_numpy(have[spec.name]), valid)
    return found


def main() -> None:
    """Run the models named on the command line, or all."""
    results = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    for name in sys.argv[1:] or REFERENCE:
        results[name] = deviations(name)
        RESULTS.parent.mkdir(exist_ok=True)
        text = {"schema": "xformopt/fidelity/1", "machine": vars(describe_machine()), "models": results}
        RESULTS.write_text(json.dumps(text, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
