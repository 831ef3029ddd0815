"""``lower``: Program -> Artifact."""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xformopt.errors import ArtifactError, LoweringError, OutputError, UsageError
from xformopt.lowering.artifact import Artifact, Workspace, copy_extra
from xformopt.lowering.catalog import ARTIFACT_TARGETS, BASELINES, GPU_TARGETS, TUNING_SECONDS
from xformopt.lowering.manifest import (
    FILE_NAME,
    DimSpec,
    Manifest,
    SessionSettings,
    TuningRecord,
    arithmetic_of,
    execution_of,
    half_precision_of,
    precision_of,
    rounds_activations,
    specs_of,
)
from xformopt.lowering.onnx_export import export_onnx
from xformopt.lowering.onnx_files import store_in_half, write_onnx
from xformopt.lowering.onnx_forms import build_graph
from xformopt.lowering.openvino import require_openvino
from xformopt.lowering.ort_session import ORT_TARGETS, require_onnxruntime
from xformopt.lowering.reference import TOLERANCE, largest_gap, reference_inputs
from xformopt.lowering.triton_build import MODEL as PACKAGE
from xformopt.lowering.triton_build import TRITON_TARGETS, Package, check_gpu_toolchain, write_package
from xformopt.lowering.triton_float8 import multiply_in_float8
from xformopt.lowering.triton_tuning import choose_tiles as choose_gpu_tiles
from xformopt.lowering.tuning import Progress, Tuned, choose_forms
from xformopt.lowering.tvm_build import MODEL as LIBRARY
from xformopt.lowering.tvm_build import TVM_TARGETS, check_toolchain, runs_here, write_library
from xformopt.lowering.tvm_padding import BATCH, LENGTH, batching_of, padding_of
from xformopt.lowering.tvm_tuning import Tiling, choose_tiles
from xformopt.measure.machine import describe_machine
from xformopt.program import Level, Program, numpy_interface, widened
from xformopt.program.storage import save_tensors

__all__ = ["lower_program"]

_MODEL = "model.onnx"
# what changes from one minute to the next says nothing of the artifact, and equal runs write equal files
_MOMENTARY = frozenset({"clock_mhz", "load_average"})


def lower_program(
    program: Program,
    target: str = "ort-cpu",
    *,
    measure: bool = True,
    sizes: Mapping[str, int] | None = None,
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    threads: int | None = None,
    captured: Program | None = None,
    history: Sequence[Any] = (),
    source: str | None = None,
    files: Sequence[str | Path] = (),
    tuning_seconds: float = TUNING_SECONDS,
    progress: Progress = lambda what, done, total: None,
) -> Artifact:
    """Lower a Program of any level for ``target``.

    Args:
        program: What to lower.
        target: ``ort-*``, ``openvino-cpu``, ``triton-cuda``, or ``tvm-*``, which is fixed to the sizes of the reference
            inputs; baselines are not artifacts.  What another architecture runs is not compared with the eager program.
        measure: Whether to time the forms an operator may take (for ``tvm-cpu`` and ``triton-cuda`` the tiles of its
            kernel); otherwise the first that fits is used.
        sizes: Sizes of dimensions to choose for; those of the example inputs where left out.
        lengths: For ``tvm-*``: compile a function for each of these lengths.  An input in between is padded to the
            next where the model has a padding mask and obeys it, and refused elsewhere.
        batches: For ``tvm-*``: compile a function for each of these batches, at every length.  Any other batch is run
            in parts of these where the model looks at each item by itself, and refused elsewhere.
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
    if captured is None and program.level == Level.CAPTURED:
        captured = program
    if target in TRITON_TARGETS:
        program = multiply_in_float8(program, torch.cuda.get_device_capability())
    executed = execution_of(program, in_half=target in GPU_TARGETS, by_kernels=target in TRITON_TARGETS)
    told = {"precision": precision_of(program), "execution": executed}
    half = None
    if target in GPU_TARGETS:
        program = numpy_interface(program)
    else:
        half, program = half_precision_of(program), widened(program)
    every = _every_size(program, target, sizes, lengths, batches)
    inputs = every[-1]
    progress("exporting", 0, 3)
    expected = {name: value.detach() for name, value in program.run(inputs).items()}
    settings = SessionSettings()
    tolerance = TOLERANCE["int8" if rounds_activations(program) else arithmetic_of(program)]
    with _room_for_work():
        workspace = Workspace()
        if target in TVM_TARGETS:
            choose = None
            if measure:
                choose = partial(
                    choose_tiles,
                    threads=threads or torch.get_num_threads(),
                    seconds=tuning_seconds,
                    progress=progress,
                )
            written = _compile(program, every, target, workspace.path, choose, tolerance)
        elif target in TRITON_TARGETS:
            choose_gpu = partial(choose_gpu_tiles, progress=progress) if measure else None
            package = write_package(program, inputs, workspace.path, choose_gpu)
            written = _Written(PACKAGE, package.forms, Tuned(records=_records_of(package)))
        else:
            exported, tuned = export_onnx(program), Tuned()
            if measure and target in ORT_TARGETS:
                tuned = choose_forms(
                    exported,
                    inputs,
                    expected,
                    settings=settings,
                    threads=threads or torch.get_num_threads(),
                    tolerance=tolerance,
                    seconds=tuning_seconds,
                    progress=progress,
                    target=target,
                )
            progress("writing", 1, 3)
            standard, on_gpu = target not in ORT_TARGETS, target == "ort-cuda"
            model, forms = build_graph(exported, tuned.forms, standard_only=standard, on_gpu=on_gpu)
            if half is not None:
                store_in_half(model, half)
            write_onnx(model, workspace.path / _MODEL)
            written = _Written(_MODEL, forms, tuned)
        (workspace.path / "program.txt").write_text(str(program), encoding="utf-8")
        save_tensors(inputs, workspace.path / "reference_inputs.safetensors")
        save_tensors(expected, workspace.path / "reference_outputs.safetensors")
        copy_extra(tuple(Path(file) for file in files), workspace.path)
    manifest = _describe(program, target, settings, written, inputs, source=source, history=tuple(history), **told)
    # a benchmark opens the folder in a process of its own before it is saved
    (workspace.path / FILE_NAME).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    artifact = Artifact(manifest, workspace.path, captured=captured, workspace=workspace)
    if runs_here(target):
        progress("comparing with the eager program", 2, 3)
        for given in every:
            _check_parity(artifact, program, given, tolerance)
    progress("lowered", 3, 3)
    return artifact


def _describe(
    program: Program,
    target: str,
    settings: SessionSettings,
    written: _Written,
    inputs: Mapping[str, torch.Tensor],
    **told: Any,
) -> Manifest:
    specs = specs_of(program)
    if written.sizes is not None:
        specs["dims"] = tuple(DimSpec(name=name, low=low, high=high) for name, (low, high) in written.sizes.items())
    return Manifest(
        xformopt=importlib.metadata.version("xformopt"),
        name=program.name,
        target=target,
        model=written.model,
        session=settings,
        forms=written.forms,
        tuning=written.tuned.records,
        tuned_at=program.bind(inputs) if written.tuned.records else {},
        fingerprint=program.fingerprint,
        machine={key: value for key, value in describe_machine().to_dict().items() if key not in _MOMENTARY},
        **specs,
        **told,
    )


@dataclass(frozen=True)
class _Written:
    """The model file, the forms its operators took, and the least and largest sizes; None: those of the program."""

    model: str
    forms: dict[str, dict[str, int]]
    tuned: Tuned
    sizes: dict[str, tuple[int, int | None]] | None = None


def _compile(
    program: Program,
    every: Sequence[Mapping[str, torch.Tensor]],
    target: str,
    folder: Path,
    choose: Callable[..., Tiling] | None,
    tolerance: float,
) -> _Written:
    """Compile for every size; the forms are those of one function."""
    bound = [program.bind(inputs) for inputs in every]
    lengths, batches = (sorted({sizes[name] for sizes in bound if name in sizes}) for name in (LENGTH, BATCH))
    padding, batching = None, None
    why_unpadded, why_whole = "", ""
    if len(lengths) > 1:
        padding, why_unpadded = padding_of(program, bound[0], lengths, tolerance)
    if len(batches) > 1:
        batching, why_whole = batching_of(program, bound[0], batches, tolerance)
    library = write_library(program, every, target, folder, choose, (padding, why_unpadded), (batching, why_whole))
    forms = {operator: {"kernel": count} for operator, count in sorted(library.kernels.items())}
    sizes: dict[str, tuple[int, int | None]] = {name: (size, bound[-1][name]) for name, size in bound[0].items()}
    if padding is not None:
        sizes[LENGTH] = program.dims[LENGTH].low, sizes[LENGTH][1]
    if batching is not None:
        sizes[BATCH] = 1, None
    return _Written(LIBRARY, forms, Tuned(records=library.tuning), sizes)


def _every_size(
    program: Program, target: str, sizes: Mapping[str, int] | None, lengths: Sequence[int], batches: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """Return inputs of every size to compile for, the largest last."""
    asked = {name: sorted(set(found)) for name, found in ((BATCH, batches), (LENGTH, lengths)) if found}
    for name in asked:
        if target not in TVM_TARGETS:
            raise UsageError(f"An artifact for {target} takes any {name}: leave out those to compile for.")
        if name not in program.dims:
            raise UsageError(f"{program.name} has no dimension {name!r} that could have several sizes.")
    every = [dict(zip(asked, chosen, strict=True)) for chosen in itertools.product(*asked.values())]
    return [reference_inputs(program, {**(sizes or {}), **chosen}) for chosen in every]


def _records_of(package: Package) -> tuple[TuningRecord, ...]:
    """Return what is to be said of a package: the tiles that were tried, and what no kernel took."""
    tried = [
        TuningRecord(operator=one.operator or "triton", form=one.key, ratio=one.ratio, note=one.note)
        for one in package.tried
    ]
    return (*tried, *(TuningRecord(operator="triton", form="aten", note=reason) for reason in package.refused))


@contextmanager
def _room_for_work() -> Iterator[None]:
    """Turn a full disk into a paragraph that names the folder for temporary files."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutputError(
            f"The disk is full: candidates and the model are first written to {tempfile.gettempdir()}, which has no "
            f"room left. Free some, or let TMPDIR name a folder on another disk."
        ) from error


def _check_target(target: str) -> None:
    if target in BASELINES:
        raise UsageError(
            f"The target {target!r} is a baseline to compare with, not something to lower to. "
            f"Lower to one of: {', '.join(ARTIFACT_TARGETS)}."
        )
    if target not in ARTIFACT_TARGETS:
        raise UsageError(f"There is no target {target!r} to lower to. Lower to one of: {', '.join(ARTIFACT_TARGETS)}.")
    if target in TVM_TARGETS:
        check_toolchain(target)
    elif target in TRITON_TARGETS:
        check_gpu_toolchain(target)
    elif target in ORT_TARGETS:
        require_onnxruntime(target)
    else:
        require_openvino()


def _check_parity(
    artifact: Artifact,
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    tolerance: float,
) -> None:
    expected = program.run(inputs)
    try:
        found = artifact.session.run({name: value.numpy() for name, value in inputs.items()})
    except ArtifactError as error:
        advice = ""
        if arithmetic_of(program) == "fp64":
            advice = " Few operators run in float64: add --pass 'convert-precision{to=fp32}'."
        raise LoweringError(f"{program.name} was lowered, but its target does not take it.{advice} {error}") from error
    name, gap = largest_gap(program, inputs, expected, found)
    if not gap <= tolerance:
        sizes = ", ".join(f"{dim}={size}" for dim, size in program.bind(inputs).items())
        raise LoweringError(
            f"Lowered to {artifact.target}, {program.name} computes something else: the output {name!r} differs from "
            f"the eager program by {gap:.1e} (relative L2, at {sizes or 'its only size'}), where {tolerance:.0e} is "
            f"allowed. This is a fault of a form or of the runtime; please report it with program.txt."
        )
