"""Does lifting find every attention?  Counts what `inspect --cost --json` shows, in both Hugging Face spellings.

    python tools/measure_attention.py         writes tools/results/attention.json

The reference models at full size, and small random models of further families (those of the tests).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TOOLS = Path(__file__).parent
sys.path += [str(TOOLS), str(TOOLS.parent / "tests" / "support")]
from reference_models import REFERENCE, dynamic_axes  # noqa: E402
from required_families import REQUIRED  # noqa: E402

import xformopt as xo  # noqa: E402
from xformopt.analysis import cost  # noqa: E402

LAYERS = {"minilm": 6, "bert-base": 12, "vit-b16": 12, "deit-s": 12, "gpt2": 12, "llama-12": 12}


def models() -> Iterator[tuple[str, str, int, torch.nn.Module, dict[str, torch.Tensor], Any]]:
    """Yield (name, implementation, layers, module, inputs, varying axes)."""
    for name, (factory, _) in REFERENCE.items():
        for how in ("eager", "sdpa"):
            module, inputs = factory(how)
            yield name, how, LAYERS[name], module, inputs, dynamic_axes(name, inputs)
    for family in REQUIRED:
        for how in family.only:
            yield family.name, how, family.attentions, family.make(how), family.inputs(2, 9, "right"), None


def main() -> None:
    """Count, print and write."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for name, how, layers, module, inputs, axes in models():
        lifted = xo.Pipeline().run(xo.capture(module, inputs, axes)).program
        operators = cost(lifted).operators
        left = sum(n for key, n in operators.items() if "softmax" in key or "scaled_dot_product" in key)
        found = operators.get("xf.attention", 0)
        row = {"model": name, "implementation": how, "layers": layers, "xf.attention": found, "softmax left": left}
        rows.append({**row, "complete": found == layers and left == 0})
        print(rows[-1], flush=True)
    result = {"schema": "xformopt/attention/1", "torch": torch.__version__, "rows": rows}
    (TOOLS / "results" / "attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
