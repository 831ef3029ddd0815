"""Measure int8 against its peers: ours, ONNX Runtime's quantize_dynamic, and NNCF on OpenVINO.

    python tools/measure_int8.py [MODEL ...]         writes tools/results/int8-MODEL.json

Every system runs in a process of its own on two threads, rounds interleaved; the fidelity of each is to the original
in eager fp32, on the same inputs.  All that calibrate see the same samples.  quantize_dynamic works on the output of
``onnxruntime.transformers.optimizer``, or on torch's export where that fails.  NNCF is installed, with the OpenVINO
that is installed here, into an environment of its own in the user's cache folder; what fails is printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import platformdirs
import torch

sys.path.append(str(Path(__file__).parent))
from measure_exact import export_with_torch, fix_shapes, optimize_with_onnxruntime
from reference_models import REFERENCE, dynamic_axes

import xformopt as xo
from xformopt.analysis import cost
from xformopt.benchmark import BenchSettings, Candidate, run_bench
from xformopt.lowering import open_runner
from xformopt.lowering.openvino import OpenVinoSession
from xformopt.lowering.session_runner import SessionRunner
from xformopt.measure.runner import Runner
from xformopt.passes import parse_pass
from xformopt.pipeline import Pipeline
from xformopt.pipeline.recipes import load_recipe
from xformopt.pipeline.run import describe
from xformopt.program import Program, example_sizes, sample_inputs, save_program

TOOLS = Path(__file__).parent
RESULTS = TOOLS / "results"
MODELS = ("minilm", "bert-base", "deit-s", "vit-b16", "gpt2")
SAMPLES = 16
# lossy systems are compared, not judged
ANY_LOSS = float("inf")
# ours, as recipe and passes after it
OURS = {
    "xformopt exact": ("exact", ()),
    "xformopt int8": ("int8", ()),
    "xformopt int8 static": ("int8-static", ()),
}


class IrRunner(SessionRunner):
    """OpenVINO's own format, which no target of ours writes."""

    def __init__(self, path: Path, *, threads: int) -> None:
        # the weights lie beside it under the same stem
        super().__init__("openvino-cpu", OpenVinoSession(path, threads=threads), path.with_suffix(""), "int8")


def open_any(target: str, path: Path, *, threads: int, profile_to: Path | None = None) -> Runner:
    """Open what ``xformopt.lowering.open_runner`` opens, and OpenVINO IR."""
    if Path(path).suffix == ".xml":
        return IrRunner(Path(path), threads=threads)
    return open_runner(target, path, threads=threads, profile_to=profile_to)


def measure(name: str, folder: Path, rounds: int) -> None:
    """Build every candidate for one model and measure them in one run."""
    model, inputs = REFERENCE[name][0]()
    axes = dynamic_axes(name, inputs)
    program = xo.capture(model, inputs, axes)
    save_program(program, folder / "program")
    samples = [sample_inputs(program, example_sizes(program), seed=seed) for seed in range(1, SAMPLES + 1)]
    counted = cost(program, example_sizes(program))
    candidates = [Candidate("eager", "eager", folder / "program", flops=counted.flops, bytes_moved=counted.bytes)]
    for label, (recipe, passes) in OURS.items():
        with reporting(name, label):
            candidates.append(build_ours(program, samples, label, (recipe, *passes), folder))
    exported = export_with_torch(model, inputs, axes, folder / "dynamo.onnx")
    candidates += quantize_with_onnxruntime(name, model, exported, folder)
    for label, source in {"dynamic": exported, "static": fix_shapes(exported, inputs, folder / "static.onnx")}.items():
        with reporting(name, f"nncf {label}"):
            candidates.append(
                quantize_with_nncf(source, samples, f"nncf openvino {label}", folder / f"nncf-{label}.xml")
            )
    reference = {key: value.numpy() for key, value in program.run(inputs).items()}
    arrays = {key: value.numpy() for key, value in inputs.items()}
    del model, program
    settings = BenchSettings(threads=2, rounds=rounds, round_seconds=0.2, open_runner="measure_int8:open_any")
    report = run_bench(candidates, arrays, reference, settings=settings, source=name)
    RESULTS.mkdir(exist_ok=True)
    report.to_json(RESULTS / f"int8-{name}.json")
    for run in report.runs:
        p50 = run.latency_ms.p50 if run.latency_ms else float("nan")
        loss = run.fidelity.relative_l2 if run.fidelity else float("nan")
        print(f"{name:10} {run.name:36} {p50:8.2f} ms  relative L2 {loss:.2e}  {run.error or ''}", flush=True)


@contextmanager
def reporting(model: str, label: str) -> Iterator[None]:
    """Print what fails and go on: a failure is part of the result."""
    try:
        yield
    except Exception as error:
        print(f"{model}: {label} fails: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def build_ours(
    program: Program, samples: list[dict[str, torch.Tensor]], label: str, steps: tuple[str, ...], folder: Path
) -> Candidate:
    """Run a recipe and further passes, and lower the result by measurement."""
    passes = (*load_recipe(steps[0]), *(parse_pass(step) for step in steps[1:]))
    result = Pipeline(passes).run(program, calibration=samples)
    artifact = xo.lower(result.program, captured=program, history=[describe(record) for record in result.history])
    path = folder / label.replace(" ", "-")
    artifact.save(path, program=False)
    precision = artifact.manifest.precision
    return Candidate(label, "ort-cpu", path, precision=precision, max_relative_l2=ANY_LOSS)


def quantize_with_onnxruntime(name: str, model: torch.nn.Module, exported: Path, folder: Path) -> list[Candidate]:
    """Quantize the optimizer's output, or torch's export where that fails; with a scale for each tensor or channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, origin = exported, "export"
    with reporting(name, "onnxruntime.transformers.optimizer"):
        optimize_with_onnxruntime(name, model, exported, folder / "optimized.onnx")
        source, origin = folder / "optimized.onnx", "optimizer"
    made = []
    # it speaks through the root logger
    logging.disable(logging.WARNING)
    for label, per_channel in {"": False, " per channel": True}.items():
        target = folder / f"onnxruntime{label.replace(' ', '-')}.onnx"
        with reporting(name, f"quantize_dynamic{label}"):
            quantize_dynamic(
                source, target, per_channel=per_channel, weight_type=QuantType.QInt8, use_external_data_format=True
            )
            title = f"onnxruntime {origin} int8{label}"
            made.append(Candidate(title, "ort-cpu", target, precision="int8", max_relative_l2=ANY_LOSS))
    logging.disable(logging.NOTSET)
    return made


def quantize_with_nncf(source: Path, samples: list[dict[str, torch.Tensor]], label: str, target: Path) -> Candidate:
    """Quantize with NNCF, which has an environment of its own."""
    arrays = target.with_suffix(".npz")
    np.savez(arrays, **{key: np.stack([sample[key].numpy() for sample in samples]) for key in samples[0]})
    python = nncf_environment()
    run([python, "-P", TOOLS / "nncf_quantize.py", source, arrays, target])
    return Candidate(label, "openvino-cpu", target, precision="int8", max_relative_l2=ANY_LOSS)


def nncf_environment() -> Path:
    """Return the Python of an environment with NNCF and the OpenVINO of this one; made where it is missing."""
    import openvino

    version = openvino.__version__.split("-")[0]
    folder = platformdirs.user_cache_path("xformopt") / f"nncf-openvino-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        run([python, "-m", "pip", "install", "--quiet", f"openvino=={version}", "nncf"])
        (folder / "ready").touch()
    return python


def run(command: list[str | Path]) -> None:
    """Run a command; its last words become the error's."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([os.fspath(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-600:]}")


def main() -> None:
    """Parse the models to measure and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    # the processes of the candidates find open_any here
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TOOLS), os.environ.get("PYTHONPATH"))))
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), options.rounds)


if __name__ == "__main__":
    main()
