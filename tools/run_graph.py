"""Run one ONNX graph in this process and print its samples and its memory, for tools/measure_lengths.py.

python tools/run_graph.py GRAPH FOLDER THREADS     reads FOLDER/inputs.npz, writes FOLDER/output.npy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from xformopt.measure.memory import peak_memory_bytes, reset_peak_memory, resident_memory_bytes
from xformopt.measure.onnx_file import OnnxFileRunner
from xformopt.measure.timing import time_round, warm_up


def main(path: Path, folder: Path, threads: int) -> None:
    arrays = dict(np.load(folder / "inputs.npz"))
    runner = OnnxFileRunner(path, threads=threads)
    reset_peak_memory()
    before = resident_memory_bytes()
    output = runner.run(arrays)["o"]
    peak = peak_memory_bytes() - before
    np.save(folder / "output.npy", output)
    warm_up(lambda: runner.run(arrays), 0.2)
    samples = time_round(lambda: runner.run(arrays), 0.5)
    print(json.dumps({"samples_ms": samples, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
