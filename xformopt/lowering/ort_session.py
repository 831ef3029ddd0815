"""ONNX Runtime sessions: opened with stored settings, run on arrays, profiled."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xformopt.errors import ArtifactError, MissingExtraError
from xformopt.measure.runner import OperatorTime

__all__ = ["ORT_TARGETS", "OrtSession", "Settings", "missing_provider", "read_profile", "require_onnxruntime"]

_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
ORT_TARGETS = tuple(_PROVIDERS)
_PROFILE_WARMUP = 2


def require_onnxruntime(target: str = "ort-cpu") -> Any:
    """Import ONNX Runtime with what ``target`` runs on, or raise MissingExtraError."""
    try:
        import onnxruntime
    except ImportError as error:
        package, extra = ("onnxruntime-gpu", "ort-gpu") if target == "ort-cuda" else ("onnxruntime", "ort")
        raise MissingExtraError(package, extra, f"The target {target}") from error
    if missing_provider(target):
        raise MissingExtraError("onnxruntime-gpu", "ort-gpu", f"The target {target}")
    return onnxruntime


def missing_provider(target: str) -> str:
    """Say what the installed ONNX Runtime lacks for ``target``, or nothing."""
    import onnxruntime

    if _PROVIDERS[target] in onnxruntime.get_available_providers():
        return ""
    return (
        f"the installed ONNX Runtime has no {_PROVIDERS[target]}: pip uninstall onnxruntime, then "
        f'pip install "xformopt[ort-gpu]"'
    )


class Settings(Protocol):
    """What a session is told besides its threads; the manifest's ``SessionSettings`` says what each means."""

    @property
    def optimization_level(self) -> str:
        """none, basic, extended, layout or all."""
        ...

    @property
    def disabled_optimizers(self) -> tuple[str, ...]:
        """Names of the runtime's own."""
        ...

    @property
    def inter_op_threads(self) -> int | None:
        """Threads between operators; None leaves the choice to the runtime."""
        ...

    @property
    def config(self) -> dict[str, str]:
        """Session options by key."""
        ...


class OrtSession:
    """One model in ONNX Runtime.

    Args:
        path: The ``.onnx`` file.
        settings: What the session is told.
        threads: Threads inside operators; None leaves the choice to ONNX Runtime.
        is_rival: Whether other sessions are timed beside it, whose idle threads must not keep spinning.
        target: ``ort-cpu`` or ``ort-cuda``; on the latter, small shape arithmetic may stay on the processor.

    Raises:
        ArtifactError: ONNX Runtime refuses the model.
        MissingExtraError: ONNX Runtime is not installed.

    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        *,
        threads: int | None = None,
        is_rival: bool = False,
        target: str = "ort-cpu",
    ) -> None:
        self.path, self.settings, self.threads, self.target = path, settings, threads, target
        self.is_rival = is_rival
        self._session: Any = self._open(None)
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def reopen(self) -> None:
        """Open the model anew, in other memory; the old session goes first, so that there is room for one."""
        self._session = None
        self._session = self._open(None)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; inputs that the model does not read may be left out or given."""
        given = {name: inputs[name] for name in self.input_names}
        return dict(zip(self.output_names, self._session.run(None, given), strict=True))

    def profile(
        self, inputs: Mapping[str, np.ndarray], rounds: int, keep: Path | None = None
    ) -> tuple[list[OperatorTime], list[str]]:
        """Return the kernel time of every node over ``rounds`` runs, and the nodes that ran elsewhere than asked.

        ``keep``: a folder for the runtime's own profile.
        """
        given = {name: inputs[name] for name in self.input_names}
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(os.fspath((keep or Path(folder)) / "ort-profile"))
            for _ in range(_PROFILE_WARMUP + rounds):
                session.run(None, given)
            return read_profile(Path(session.end_profiling()), skip=_PROFILE_WARMUP, target=self.target)

    def _open(self, profile_prefix: str | None) -> Any:
        runtime = require_onnxruntime(self.target)
        options = runtime.SessionOptions()
        options.graph_optimization_level = getattr(
            runtime.GraphOptimizationLevel, f"ORT_{_LEVELS[self.settings.optimization_level]}"
        )
        # an artifact speaks through its errors; warnings are for whoever builds graphs by hand
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.settings.inter_op_threads is not None:
            options.inter_op_num_threads = self.settings.inter_op_threads
        for key, value in self.settings.config.items():
            options.add_session_config_entry(key, value)
        if self.is_rival:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        try:
            session = runtime.InferenceSession(
                os.fspath(self.path),
                options,
                providers=[_PROVIDERS[self.target]],
                disabled_optimizers=list(self.settings.disabled_optimizers) or None,
            )
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime {runtime.__version__} cannot open {self.path}: {str(error).strip()} "
                f"Lower the model again with this version, or install the one named in artifact.json."
            ) from error
        # a provider that fails to start is left out without an error
        if _PROVIDERS[self.target] not in session.get_providers():
            raise ArtifactError(
                f"ONNX Runtime {runtime.__version__} could not start its {_PROVIDERS[self.target]} for {self.path}: "
                f"it needs an NVIDIA GPU with the CUDA and cuDNN that this release was built for."
            )
        return session


_LEVELS = {
    "none": "DISABLE_ALL",
    "basic": "ENABLE_BASIC",
    "extended": "ENABLE_EXTENDED",
    "layout": "ENABLE_LAYOUT",
    "all": "ENABLE_ALL",
}


def read_profile(path: Path, *, skip: int = 0, target: str = "ort-cpu") -> tuple[list[OperatorTime], list[str]]:
    """Read an ONNX Runtime profile.

    Args:
        path: The JSON file that the runtime wrote.
        skip: Runs at the beginning that do not count.
        target: Whose provider nodes are to run on.

    Returns:
        Kernel time by node, longest first, and one line for each node on another provider than the target's.

    """
    events = json.loads(path.read_text(encoding="utf-8"))
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    elsewhere: dict[str, None] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        arguments = event.get("args", {})
        node, operator = name.removesuffix("_kernel_time"), arguments.get("op_name", "")
        totals[node, operator].append(event["dur"] / 1e3)
        if (provider := arguments.get("provider", "")) not in ("", _PROVIDERS[target]):
            elsewhere[f"{node} ({operator}) ran on {provider}"] = None
    times = [OperatorTime(n, o, sum(ms[skip:]), len(ms[skip:])) for (n, o), ms in totals.items()]
    return sorted(times, key=lambda time: -time.total_ms), list(elsewhere)
