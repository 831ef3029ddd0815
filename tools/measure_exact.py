"""Measure the exact recipe against its peers: eager, ONNX Runtime on torch's export, its optimizer, and OpenVINO.

    python tools/measure_exact.py [MODEL ...]         writes tools/results/exact-MODEL.json

Every system runs in a process of its own on two threads, rounds interleaved; parity is checked before any time is
believed.  "onnxruntime optimizer" is ``onnxruntime.transformers.optimizer`` on torch's export; where it fails, that is
printed.  OpenVINO reads torch's export, once with dynamic shapes and once reshaped to the measured one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))
from reference_models import REFERENCE, dynamic_axes

import xformopt as xo
from xformopt.analysis import cost
from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.pipeline.run import describe
from xformopt.program import example_sizes, save_program

RESULTS = Path(__file__).parent / "results"
OPTIMIZER_TYPES = {"vit-b16": "vit", "deit-s": "vit", "gpt2": "gpt2", "llama-12": "gpt2"}


def measure(name: str, folder: Path, rounds: int) -> None:
    """Build every candidate for one model and measure them in one run."""
    model, inputs = REFERENCE[name][0]()
    axes = dynamic_axes(name, inputs)
    program = xo.capture(model, inputs, axes)
    result = xo.Pipeline.recipe("exact").run(program)
    artifact = xo.lower(result.program, captured=program, history=[describe(r) for r in result.history])
    artifact.save(folder / "ours")
    save_program(program, folder / "program")
    peers = export_peers(name, model, inputs, axes, folder)
    counted = cost(program, example_sizes(program))
    candidates = [
        Candidate("eager", "eager", folder / "program", flops=counted.flops, bytes_moved=counted.bytes),
        Candidate("xformopt ort-cpu", "ort-cpu", folder / "ours", flops=counted.flops, bytes_moved=counted.bytes),
        *peers,
    ]
    reference = {key: value.numpy() for key, value in program.run(inputs).items()}
    arrays = {key: value.numpy() for key, value in inputs.items()}
    del model, program, result, artifact
    report = run_bench(
        candidates, arrays, reference, settings=BenchSettings(threads=2, rounds=rounds, round_seconds=0.2), source=name
    )
    RESULTS.mkdir(exist_ok=True)
    report.to_json(RESULTS / f"exact-{name}.json")
    for run in report.runs:
        p50 = run.latency_ms.p50 if run.latency_ms else float("nan")
        print(f"{name:10} {run.name:28} {p50:8.2f} ms  {run.error or ''}", flush=True)


def export_peers(
    name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], axes: dict, folder: Path
) -> list[Candidate]:
    """Export with torch, optimize with ONNX Runtime's transformer optimizer, and list what came of it."""
    exported = export_with_torch(model, inputs, axes, folder / "dynamo.onnx")
    peers = [Candidate("onnxruntime torch export", "ort-cpu", exported)]
    optimized = folder / "optimized.onnx"
    try:
        optimize_with_onnxruntime(name, model, exported, optimized)
        peers.append(Candidate("onnxruntime optimizer", "ort-cpu", optimized))
    except Exception as error:
        # the peer's failure is part of the result
        print(f"{name}: onnxruntime.transformers.optimizer fails: {type(error).__name__}: {error}", file=sys.stderr)
    peers.append(Candidate("openvino dynamic", "openvino-cpu", exported))
    peers.append(Candidate("openvino static", "openvino-cpu", fix_shapes(exported, inputs, folder / "static.onnx")))
    return peers


def export_with_torch(model: torch.nn.Module, inputs: dict[str, torch.Tensor], axes: dict, target: Path) -> Path:
    """Export with torch's own exporter, with the same dynamic axes as ours."""
    shapes = {key: dict.fromkeys(found, torch.export.Dim.AUTO) for key, found in axes.items()}
    # torch.export takes sizes of 1 for constants: export at batch 2
    doubled = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        onnx = torch.onnx.export(model, (), kwargs=doubled, dynamo=True, dynamic_shapes=shapes)
        onnx.save(str(target))
    return target


def optimize_with_onnxruntime(name: str, model: torch.nn.Module, source: Path, target: Path) -> None:
    """Run the optimizer that ONNX Runtime recommends for transformers."""
    from onnxruntime.transformers import optimizer

    config = next(m.config for m in model.modules() if hasattr(m, "config"))
    heads = getattr(config, "num_attention_heads", 0) or getattr(config, "n_head", 0)
    width = getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0)
    with contextlib.redirect_stdout(io.StringIO()):
        done = optimizer.optimize_model(
            str(source), model_type=OPTIMIZER_TYPES.get(name, "bert"), num_heads=heads, hidden_size=width, opt_level=1
        )
    done.save_model_to_file(str(target), use_external_data_format=True)


def fix_shapes(source: Path, inputs: dict[str, torch.Tensor], target: Path) -> Path:
    """Write the export with every input dimension fixed to the measured size."""
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    for value in model.graph.input:
        for axis, size in enumerate(inputs[value.name].shape):
            value.type.tensor_type.shape.dim[axis].dim_value = size
    onnx.save(model, str(target))
    return target


def main() -> None:
    """Parse the models to measure and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL", help=f"of {', '.join(REFERENCE)}")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for name in options.models or REFERENCE:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), options.rounds)


if __name__ == "__main__":
    np.random.seed(0)
    main()
