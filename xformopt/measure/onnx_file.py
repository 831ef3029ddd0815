"""Owns running one ONNX file in ONNX Runtime on the CPU, and reading the profile that the runtime writes."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xformopt.errors import MeasurementError, MissingExtraError
from xformopt.measure.runner import OperatorTime

__all__ = ["OnnxFileRunner", "read_profile"]

_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
_SETTINGS = ("optimization_level", "disabled_optimizers", "inter_op_threads", "config")
_PROFILE_WARMUP = 2


class OnnxFileRunner:
    """A Runner over a plain ONNX file.

    Args:
        path: The file; external data lies beside it.
        threads: Intra-operator threads.
        settings: What a session is told beside that: `optimization_level` ("none", "basic", "extended",
            "layout", "all"), `disabled_optimizers` (names), `inter_op_threads`, `config` (session entries).
        precision: What the report calls the arithmetic of this file.
        profile_to: A folder that keeps the runtime's own profile; None keeps none.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        MeasurementError: The file is missing, the runtime refuses it, or a setting is unknown.

    """

    target = "ort-cpu"

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int,
        settings: Mapping[str, Any] | None = None,
        precision: str = "fp32",
        profile_to: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.threads = threads
        self.settings = dict(settings or {})
        self.precision = precision
        self.profile_to = profile_to
        self.fallbacks: list[str] = []
        self._session = self._open()
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    @property
    def size_bytes(self) -> int:
        """The file, and every file of external data beside it that carries its name."""
        parts = self.path.parent.glob(f"{_escaped(self.path.name)}*")
        return sum(part.stat().st_size for part in parts if part.is_file())

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; inputs that the file does not name are ignored."""
        return self._run(self._session, inputs)

    def profile(self, inputs: Mapping[str, np.ndarray], rounds: int) -> list[OperatorTime]:
        """Profile `rounds` runs in a session of their own, since profiling slows a session down."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.profile_to or Path(scratch)
            session = self._open(profile_to=folder)
            for _ in range(_PROFILE_WARMUP + rounds):
                self._run(session, inputs)
            return read_profile(Path(session.end_profiling()), skip_runs=_PROFILE_WARMUP)

    def _run(self, session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise MeasurementError(
                f"{self.path.name} needs the inputs {', '.join(missing)}, which were not given "
                f"(given: {', '.join(inputs) or 'none'}). Give an array for each."
            )
        outputs = session.run(None, {name: inputs[name] for name in self.input_names})
        return dict(zip(self.output_names, outputs, strict=True))

    def _open(self, profile_to: Path | None = None) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "ort", "Running an ONNX file") from error
        if not self.path.is_file():
            raise MeasurementError(f"there is no ONNX file at {self.path}. Check the path.")
        options = _session_options(onnxruntime, self.threads, self.settings)
        if profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_to / self.path.stem)
        disabled = list(self.settings.get("disabled_optimizers", ()))
        try:
            return onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise MeasurementError(f"ONNX Runtime cannot open {self.path.name}: {reason}") from error


def read_profile(path: Path, *, skip_runs: int = 0) -> list[OperatorTime]:
    """Sum the kernel times of a profile by node, slowest first, without the first `skip_runs` runs."""
    events = json.loads(path.read_text())
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    start = runs[skip_runs] if skip_runs < len(runs) else 0
    total: dict[tuple[str, str], float] = defaultdict(float)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or event["ts"] < start:
            continue
        key = (name.removesuffix("_kernel_time"), event["args"]["op_name"])
        total[key] += event["dur"] / 1e3
        count[key] += 1
    nodes = [OperatorTime(name, kind, total[name, kind], count[name, kind]) for name, kind in total]
    return sorted(nodes, key=lambda node: -node.total_ms)


def _session_options(onnxruntime: Any, threads: int, settings: Mapping[str, Any]) -> Any:
    unknown = sorted(set(settings) - set(_SETTINGS))
    level = settings.get("optimization_level", "all")
    if unknown or level not in _LEVELS:
        wrong = f"settings {', '.join(unknown)}" if unknown else f'optimization level "{level}"'
        raise MeasurementError(
            f"unknown session {wrong}; known are the settings {', '.join(_SETTINGS)} "
            f"and the levels {', '.join(_LEVELS)}."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = settings.get("inter_op_threads", 1)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[level])
    options.log_severity_level = 3
    for key, value in settings.get("config", {}).items():
        options.add_session_config_entry(key, str(value))
    return options


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)
