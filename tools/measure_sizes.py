"""Measure the bytes on disk of BERT-base in few bits, embeddings included.

    python tools/measure_sizes.py       writes tools/results/sizes.json

Recipes int8 and int4, and block-wise quantization of everything (BCT), whose paper reports 7.988 times fewer bytes.
Weights are random: sizes do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE, dynamic_axes

import xformopt as xo
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.pipeline.recipes import load_recipe

RESULTS = Path(__file__).parent / "results" / "sizes.json"
MODEL = "bert-base"
MADE = {
    "fp32": tuple(load_recipe("exact")),
    "int8": tuple(load_recipe("int8")),
    "int4": tuple(load_recipe("int4")),
    "BCT": (parse_pass("quantize-blocks"),),
}


def main() -> None:
    """Lower each and add up its files."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model, inputs = REFERENCE[MODEL][0]()
    program = xo.capture(model, inputs, dynamic_axes(MODEL, inputs))
    rows: dict[str, dict[str, float]] = {}
    for label, steps in MADE.items():
        result = Pipeline(steps).run(program, calibration=[inputs])
        with tempfile.TemporaryDirectory() as folder:
            xo.lower(result.program, measure=False).save(Path(folder) / "artifact", program=False)
            size = sum(path.stat().st_size for path in Path(folder, "artifact").glob("*.onnx*"))
        rows[label] = {"bytes": size, "share": size / rows["fp32"]["bytes"] if rows else 1.0}
        print(label, rows[label], flush=True)
    RESULTS.write_text(json.dumps({"schema": "xformopt/sizes/1", "model": MODEL, "artifacts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
