"""``lower``: Program -> Artifact."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xformopt.errors import LoweringError, UsageError
from xformopt.kernels.definition import find_operator
from xformopt.lowering.artifact import Artifact, Workspace, copy_extra
from xformopt.lowering.catalog import ARTIFACT_TARGETS, BASELINES
from xformopt.lowering.manifest import FILE_NAME, Manifest, SessionSettings, precision_of, specs_of
from xformopt.lowering.onnx_export import export_onnx
from xformopt.lowering.onnx_files import write_onnx
from xformopt.lowering.onnx_forms import build_graph, forms_of
from xformopt.lowering.openvino import require_openvino
from xformopt.lowering.ort_session import require_onnxruntime
from xformopt.lowering.reference import TOLERANCE, largest_gap, reference_inputs
from xformopt.lowering.tuning import Progress, Tuned, choose_forms
from xformopt.measure.machine import describe_machine
from xformopt.program import Level, Program
from xformopt.program.storage import save_tensors

__all__ = ["lower_program"]

_MODEL = "model.onnx"


def lower_program(
    program: Program,
    target: str = "ort-cpu",
    *,
    measure: bool = True,
    sizes: Mapping[str, int] | None = None,
    threads: int | None = None,
    captured: Program | None = None,
    history: Sequence[Any] = (),
    source: str | None = None,
    files: Sequence[str | Path] = (),
    tuning_seconds: float = 40.0,
    progress: Progress = lambda what, done, total: None,
) -> Artifact:
    """Lower a Program of any level for ``target``.

    Args:
        program: What to lower.
        target: ``ort-cpu`` or ``openvino-cpu``; baselines are not artifacts.
        measure: Whether to time the forms an operator may take; otherwise the first that fits is used.
        sizes: Sizes of dimensions to choose for; those of the example inputs where left out.
        threads: Threads to choose for; torch's own number where left out.
        captured: The original Program, stored with the artifact.
        history: What each pass did, as JSON values.
        source: The MODEL it came from.
        files: Tokenizer or processor files to copy beside the model.
        tuning_seconds: When to stop trying further forms.
        progress: Called with (what, done, total).

    Raises:
        UsageError: an unknown target, or a baseline.
        LoweringError: an operator cannot be expressed, or the result differs from the eager program.
        MissingExtraError: the target's packages are not installed.

    """
    _check_target(target)
    inputs = reference_inputs(program, sizes)
    progress("exporting", 0, 3)
    exported = export_onnx(program)
    expected = {name: value.detach() for name, value in program.run(inputs).items()}
    settings = SessionSettings()
    tolerance = TOLERANCE[precision_of(program)]
    threads = threads or torch.get_num_threads()
    tuned = Tuned()
    is_standard = target != "ort-cpu"
    if measure and not is_standard:
        tuned = choose_forms(
            exported,
            inputs,
            expected,
            settings=settings,
            threads=threads,
            tolerance=tolerance,
            seconds=tuning_seconds,
            progress=progress,
        )
    workspace = Workspace()
    folder = workspace.path
    progress("writing", 1, 3)
    write_onnx(build_graph(exported, tuned.forms, standard_only=is_standard), folder / _MODEL)
    (folder / "program.txt").write_text(str(program), encoding="utf-8")
    save_tensors(inputs, folder / "reference_inputs.safetensors")
    save_tensors(expected, folder / "reference_outputs.safetensors")
    copy_extra(tuple(Path(file) for file in files), folder)
    manifest = Manifest(
        xformopt=importlib.metadata.version("xformopt"),
        name=program.name,
        target=target,
        model=_MODEL,
        precision=precision_of(program),
        session=settings,
        forms=_forms_used(program, tuned),
        tuning=tuned.records,
        tuned_at=program.bind(inputs) if tuned.records else {},
        fingerprint=program.fingerprint,
        source=source,
        history=tuple(history),
        machine=describe_machine().to_dict(),
        **specs_of(program),
    )
    if captured is None and program.level == Level.CAPTURED:
        captured = program
    # a benchmark opens the folder in a process of its own before it is saved
    (folder / FILE_NAME).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    artifact = Artifact(manifest, folder, captured=captured, workspace=workspace)
    progress("comparing with the eager program", 2, 3)
    _check_parity(artifact, program, inputs, expected, tolerance)
    progress("lowered", 3, 3)
    return artifact


def _check_target(target: str) -> None:
    if target in BASELINES:
        raise UsageError(
            f"The target {target!r} is a baseline to compare with, not something to lower to. "
            f"Lower to one of: {', '.join(ARTIFACT_TARGETS)}."
        )
    if target not in ARTIFACT_TARGETS:
        raise UsageError(f"There is no target {target!r} to lower to. Lower to one of: {', '.join(ARTIFACT_TARGETS)}.")
    (require_onnxruntime if target == "ort-cpu" else require_openvino)()


def _forms_used(program: Program, tuned: Tuned) -> dict[str, str]:
    operators = {operator.name for node in program.nodes() if (operator := find_operator(node.target))}
    return {op: tuned.forms.get(op, forms_of(op)[0].name) for op in sorted(operators)} | tuned.forms


def _check_parity(
    artifact: Artifact,
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tolerance: float,
) -> None:
    found = artifact.session.run({name: value.numpy() for name, value in inputs.items()})
    name, gap = largest_gap(program, inputs, expected, found)
    if not gap <= tolerance:
        sizes = ", ".join(f"{dim}={size}" for dim, size in program.bind(inputs).items())
        raise LoweringError(
            f"Lowered to {artifact.target}, {program.name} computes something else: the output {name!r} differs from "
            f"the eager program by {gap:.1e} (relative L2, at {sizes or 'its only size'}), where {tolerance:.0e} is "
            f"allowed. This is a fault of a form or of the runtime; please report it with program.txt."
        )
