"""Lowering: Program -> Artifact, one target at a time, with the forms of operators chosen by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xformopt.errors import UsageError

if TYPE_CHECKING:
    from xformopt.lowering.artifact import Artifact
    from xformopt.lowering.catalog import Target
    from xformopt.measure.runner import Runner
    from xformopt.program import Program

__all__ = ["load", "lower", "open_runner", "targets"]


def lower(program: Program, target: str = "ort-cpu", **options: Any) -> Artifact:
    """Lower a Program of any level; options are those of :func:`xformopt.lowering.build.lower_program`."""
    from xformopt.lowering.build import lower_program

    return lower_program(program, target, **options)


def load(path: str | Path, *, threads: int | None = None, verify: bool = True) -> Artifact:
    """Open an artifact directory; see :func:`xformopt.lowering.artifact.load_artifact`."""
    from xformopt.lowering.artifact import load_artifact

    return load_artifact(path, threads=threads, verify=verify)


def open_runner(target: str, path: str | Path, *, threads: int, profile_to: Path | None = None) -> Runner:
    """Open a model on a target for benchmarking.

    Args:
        target: ``eager`` or ``inductor`` for the folder of a saved Program; ``ort-*`` or ``openvino-cpu`` for an
            artifact directory or an ``.onnx`` file; ``triton-cuda`` or ``tvm-*`` for an artifact directory.
        path: The folder or file.
        threads: Threads inside operators.
        profile_to: A folder for the runtime's own profile.

    Raises:
        UsageError: there is no such target.
        ArtifactError: what lies at ``path`` cannot be opened.
        MissingExtraError: the target's packages are not installed.

    """
    from xformopt.lowering import runners
    from xformopt.lowering.catalog import ARTIFACT_TARGETS, BASELINES

    path = Path(path).expanduser()
    if target in BASELINES:
        return runners.TorchRunner(target, path, threads=threads, profile_to=profile_to)
    if target in ("ort-cpu", "ort-cuda"):
        return runners.OrtRunner(target, path, threads=threads, profile_to=profile_to)
    if target == "triton-cuda":
        return runners.TritonRunner(path, profile_to=profile_to)
    if target == "openvino-cpu":
        return runners.OpenVinoRunner(path, threads=threads, profile_to=profile_to)
    if target in ARTIFACT_TARGETS:
        return runners.TvmRunner(target, path, threads=threads)
    known = ", ".join((*BASELINES, *ARTIFACT_TARGETS))
    raise UsageError(f"There is no target {target!r}. The targets are: {known}.")


def targets() -> list[Target]:
    """List every target, whether this machine can use it, and if not why."""
    from xformopt.lowering.catalog import targets as list_targets

    return list_targets()
