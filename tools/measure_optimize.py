"""What ``optimize --no-bench`` costs: seconds and peak memory, verification and measured lowering included.

    python tools/measure_optimize.py         writes tools/results/optimize.json

The command runs in a process of its own, with an empty cache of measured forms.  The issue's bounds: 60 s for MiniLM,
180 s for BERT-base, and three times the model's size plus 1.5 GB.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE

from xformopt.measure.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "optimize.json"
BOUND_SECONDS = {"minilm": 60, "bert-base": 180}


def measure(name: str, folder: Path) -> dict[str, object]:
    """Optimize one model; the peak memory of children only ever grows, so call this once in a process."""
    model = REFERENCE[name][0]()[0]
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    source = name if name == "minilm" else f"reference_models:{name.replace('-', '_')}"
    command = [sys.executable, "-m", "xformopt", "optimize", source, "--no-bench", "-o", str(folder / "out")]
    paths = {"XFORMOPT_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parent)}
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, env={**os.environ, **paths})
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "model_bytes": size,
        "seconds": round(seconds, 1),
        "bound_seconds": BOUND_SECONDS[name],
        "peak_bytes": peak,
        "bound_bytes": int(3 * size + 1.5e9),
    }


def main() -> None:
    """Measure each model in a process of its own, smallest first, or the one named."""
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(sys.argv[1], Path(folder))))
        return
    results = {}
    for name in BOUND_SECONDS:
        done = subprocess.run([sys.executable, "-P", __file__, name], check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    text = {"schema": "xformopt/optimize/1", "machine": vars(describe_machine()), "models": results}
    RESULTS.write_text(json.dumps(text, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
