"""Opens an artifact of a bundle in the runtime of its target."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xformopt.errors import ArtifactError, MeasurementError, MissingExtraError
from xformopt.lowering.openvino import OpenVinoSession
from xformopt.lowering.ort_session import OrtSession
from xformopt.lowering.session_runner import ProfiledSession, SessionRunner
from xformopt.lowering.tvm_session import TvmSession

__all__ = ["TARGETS", "open_runner"]

# targets that a bundle can carry
TARGETS = ("ort-cpu", "openvino-cpu", "tvm-cpu", "tvm-x86-64-v3", "tvm-aarch64")


@dataclass(frozen=True)
class _Settings:
    """What ``artifact.json`` says under ``session``."""

    optimization_level: str = "all"
    disabled_optimizers: tuple[str, ...] = ()
    inter_op_threads: int | None = None
    config: dict[str, str] = field(default_factory=dict)


def open_runner(target: str, path: Path, *, threads: int, profile_to: Path | None = None) -> SessionRunner:
    """Open the artifact in the folder ``path``.

    Raises:
        MeasurementError: this runner does not know the target, or its runtime is not installed here.
        ArtifactError: the runtime refuses the model.

    """
    manifest = json.loads((path / "artifact.json").read_text(encoding="utf-8"))
    model = path / manifest["model"]
    try:
        session = _open(target, model, manifest["session"], threads)
    except MissingExtraError as error:
        raise MeasurementError(
            f'the target {target} needs the package "{error.package}", which this machine lacks: '
            f"pip install {error.package}"
        ) from error
    return SessionRunner(target, session, model, manifest["precision"], profile_to)


def _open(target: str, model: Path, settings: dict[str, Any], threads: int) -> ProfiledSession:
    if target == "ort-cpu":
        return OrtSession(model, _Settings(**settings), threads=threads)
    if target == "openvino-cpu":
        return OpenVinoSession(model, threads=threads)
    if target in TARGETS:
        return TvmSession(model, threads=threads)
    raise ArtifactError(f"this runner does not know the target {target!r}; it knows {', '.join(TARGETS)}.")
