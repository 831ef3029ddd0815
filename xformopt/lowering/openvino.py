"""OpenVINO on the CPU: an ONNX model of standard operators, run in fp32 with the latency hint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xformopt.errors import ArtifactError, MissingExtraError
from xformopt.measure.runner import OperatorTime

__all__ = ["OpenVinoSession", "require_openvino"]


def require_openvino() -> Any:
    """Import OpenVINO, or raise MissingExtraError."""
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "The target openvino-cpu") from error
    return openvino


class OpenVinoSession:
    """One model in OpenVINO.

    Raises:
        ArtifactError: OpenVINO refuses the model.
        MissingExtraError: OpenVINO is not installed.

    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self.threads = path, threads
        self._model = self._compile()
        self.input_names = tuple(port.get_any_name() for port in self._model.inputs)
        self.output_names = tuple(port.get_any_name() for port in self._model.outputs)
        self._request = self._model.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        found = self._request.infer({name: inputs[name] for name in self.input_names}, share_inputs=True)
        return {name: np.array(found[name]) for name in self.output_names}

    def profile(
        self, inputs: Mapping[str, np.ndarray], rounds: int, keep: Path | None = None
    ) -> tuple[list[OperatorTime], list[str]]:
        """Return the time of every executed node over ``rounds`` runs, longest first, and no falls back.

        OpenVINO writes no profile of its own to ``keep``.
        """
        request = self._compile(PERF_COUNT=True).create_infer_request()
        given = {name: inputs[name] for name in self.input_names}
        totals: dict[tuple[str, str], list[float]] = {}
        request.infer(given, share_inputs=True)
        for _ in range(rounds):
            request.infer(given, share_inputs=True)
            for entry in request.profiling_info:
                if entry.real_time.total_seconds() > 0:
                    key = (entry.node_name, entry.node_type)
                    totals.setdefault(key, []).append(entry.real_time.total_seconds() * 1e3)
        times = [OperatorTime(node, kind, sum(ms), len(ms)) for (node, kind), ms in totals.items()]
        return sorted(times, key=lambda time: -time.total_ms), []

    def _compile(self, **options: Any) -> Any:
        openvino = require_openvino()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", **options}
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        try:
            core = openvino.Core()
            return core.compile_model(core.read_model(os.fspath(self.path)), "CPU", settings)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"OpenVINO cannot open {self.path}: {reason[:400]} "
                f"A model made for ort-cpu may hold operators of ONNX Runtime alone: lower it for openvino-cpu."
            ) from error
