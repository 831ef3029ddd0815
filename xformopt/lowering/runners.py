"""Runners: a model opened on one target, for benchmarks; the baselines run a saved Program in torch itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xformopt.errors import ArtifactError
from xformopt.lowering.artifact import complete_inputs
from xformopt.lowering.manifest import FILE_NAME, SessionSettings, precision_of, read_manifest
from xformopt.lowering.onnx_files import check_external_data
from xformopt.lowering.openvino import OpenVinoSession
from xformopt.lowering.ort_session import OrtSession
from xformopt.lowering.session_runner import SessionRunner
from xformopt.lowering.tvm_session import TvmSession
from xformopt.measure.runner import OperatorTime
from xformopt.program import Program, load_program

__all__ = ["OpenVinoRunner", "OrtRunner", "TorchRunner", "TritonRunner", "TvmRunner"]


class TorchRunner:
    """A saved Program in torch: node by node (``eager``) or compiled by Inductor (``inductor``)."""

    def __init__(self, target: str, path: Path, *, threads: int, profile_to: Path | None = None) -> None:
        self.target = target
        torch.set_num_threads(threads)
        program: Program = load_program(path, verify=False)
        self.input_names, self.output_names = program.input_names, program.output_names
        self.size_bytes, self.precision = program.parameter_bytes, precision_of(program)
        self.fallbacks: list[str] = []
        self._profile_to = profile_to
        module = program.module().eval()
        self._call: Any = torch.compile(module, dynamic=False) if target == "inductor" else module

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        with torch.inference_mode():
            outputs = self._call(*self._tensors(inputs))
        return {name: value.numpy() for name, value in zip(self.output_names, outputs, strict=True)}

    def profile(self, inputs: Mapping[str, np.ndarray], rounds: int) -> list[OperatorTime] | None:
        """Return the time of every ATen operator (or compiled kernel) over ``rounds`` runs, longest first."""
        from torch.profiler import ProfilerActivity, profile

        self.run(inputs)
        with profile(activities=[ProfilerActivity.CPU]) as taken:
            for _ in range(rounds):
                self.run(inputs)
        if self._profile_to is not None:
            taken.export_chrome_trace(str(self._profile_to / f"{self.target}-trace.json"))
        times = [
            OperatorTime(event.key, event.key, event.self_cpu_time_total / 1e3, event.count)
            for event in taken.key_averages()
        ]
        return sorted(times, key=lambda time: -time.total_ms)

    def _tensors(self, inputs: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.input_names]


class OrtRunner(SessionRunner):
    """An artifact directory, or a plain ONNX file, in ONNX Runtime."""

    def __init__(self, target: str, path: Path, *, threads: int, profile_to: Path | None = None) -> None:
        model, settings, precision = _model_of(path)
        session = OrtSession(model, settings, threads=threads, target=target)
        super().__init__(target, session, model, precision, profile_to)
        self._manifest = read_manifest(path) if path.is_dir() else None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; inputs that have a default may be missing."""
        return super().run(self._completed(inputs))

    def profile(self, inputs: Mapping[str, np.ndarray], rounds: int) -> list[OperatorTime] | None:
        """Return the kernel time of every node over ``rounds`` runs, longest first."""
        return super().profile(self._completed(inputs), rounds)

    def _completed(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return inputs if self._manifest is None else complete_inputs(self._manifest, inputs)


class OpenVinoRunner(SessionRunner):
    """An artifact directory, or a plain ONNX file, in OpenVINO."""

    def __init__(self, path: Path, *, threads: int, profile_to: Path | None = None) -> None:
        model, _, precision = _model_of(path)
        super().__init__("openvino-cpu", OpenVinoSession(model, threads=threads), model, precision)


class TvmRunner(SessionRunner):
    """An artifact directory in TVM's virtual machine."""

    def __init__(self, target: str, path: Path, *, threads: int) -> None:
        manifest = read_manifest(path)
        model = path / manifest.model
        super().__init__(target, TvmSession(model, threads=threads), model, manifest.precision)


class TritonRunner(SessionRunner):
    """An artifact directory with a package of AOTInductor, on its GPU."""

    def __init__(self, path: Path, *, profile_to: Path | None = None) -> None:
        from xformopt.lowering.triton_session import TritonSession

        manifest = read_manifest(path)
        model = path / manifest.model
        super().__init__("triton-cuda", TritonSession(model), model, manifest.precision, profile_to)


def _model_of(path: Path) -> tuple[Path, SessionSettings, str]:
    """Return the model file of an artifact or the file itself, its session settings and its precision."""
    if path.is_dir():
        manifest = read_manifest(path)
        model, settings, precision = path / manifest.model, manifest.session, manifest.precision
    else:
        model, settings, precision = path, SessionSettings(), "fp32"
    if not model.is_file():
        raise ArtifactError(f"{model} does not exist. Name an artifact directory (with {FILE_NAME}) or an .onnx file.")
    check_external_data(model)
    return model, settings, precision
