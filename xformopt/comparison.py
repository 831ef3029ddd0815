"""What stands in a comparison: artifacts, ONNX files and baselines as candidates, and the original they are held to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from xformopt.analysis.cost import cost
from xformopt.benchmark import BenchSettings, Candidate, Progress, run_bench
from xformopt.errors import ArtifactError, LoweringError, MeasurementError, UsageError
from xformopt.program import Program, example_sizes, sample_inputs, save_program, valid_positions

if TYPE_CHECKING:
    from xformopt.lowering.artifact import Artifact
    from xformopt.measure.runner import Array
    from xformopt.report.schema import BenchReport

__all__ = [
    "BASELINES",
    "Reference",
    "add_baselines",
    "artifact_candidate",
    "as_tensors",
    "check_target",
    "compare",
    "measured_speedup",
    "measured_times",
    "onnx_candidate",
    "onnx_inputs",
    "reference_of",
    "unique_names",
]

# run the captured Program itself: something to compare with, not something to lower to
BASELINES = ("eager", "inductor")
_DEFAULT_LENGTH = 128
_GATHERS = ("embedding", "index_select", "gather", "index")


def check_target(name: str, *, baseline: bool = True) -> str:
    """Return the target's name if it exists and can be used here.

    Args:
        name: As the user gave it.
        baseline: Whether ``eager`` and ``inductor`` will do.

    Raises:
        UsageError: there is no such target, or it is a baseline where an artifact is asked for.
        LoweringError: this machine cannot use it; the message says why.

    """
    from xformopt.lowering import targets

    known = {target.name: target for target in targets() if baseline or target.name not in BASELINES}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        what = f'"{name}" is a baseline to compare with' if name in BASELINES else f'There is no target "{name}"'
        raise UsageError(f"{what}.{hint} The targets are: {', '.join(known)}.")
    if not known[name].available:
        raise LoweringError(f"The target {name} cannot be used here: {known[name].why_not}.")
    return name


def artifact_candidate(artifact: Artifact, name: str) -> Candidate:
    """Return an artifact as a candidate; one that a lossy pass made is not held to the tolerance of exact passes."""
    lossy = any(_was_lossy(record) for record in artifact.manifest.history)
    limit = float("inf") if lossy else None
    return Candidate(
        name, artifact.target, artifact.folder, precision=artifact.manifest.precision, max_relative_l2=limit
    )


def _was_lossy(record: Any) -> bool:
    changed = isinstance(record, Mapping) and record.get("changed") and not record.get("dropped")
    return bool(changed) and record.get("effect") != "exact"


def onnx_candidate(path: Path) -> Candidate:
    """Return a plain ONNX file as a candidate.

    Raises:
        ArtifactError: there is no such file.

    """
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}. Name an .onnx file, an artifact directory or a model.")
    return Candidate(path.stem, "ort-cpu", path.resolve())


def add_baselines(names: Iterable[str], program: Program, folder: Path) -> list[Candidate]:
    """Save the original to ``folder`` and return the baselines that run it."""
    names = list(names)
    if not names:
        return []
    save_program(program, folder / "original")
    return [Candidate(name, name, folder / "original") for name in names]


def unique_names(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Number the candidates that would bear the same name."""
    seen: dict[str, int] = {}
    named = []
    for candidate in candidates:
        seen[candidate.name] = count = seen.get(candidate.name, 0) + 1
        named.append(candidate if count == 1 else replace(candidate, name=f"{candidate.name}-{count}"))
    return named


@dataclass(frozen=True)
class Reference:
    """What the original computes, which positions count, and what computing it costs."""

    outputs: dict[str, Array]
    valid: dict[str, Array]
    flops: float
    bytes_moved: float


def compare(
    candidates: Sequence[Candidate],
    inputs: Mapping[str, torch.Tensor],
    original: Program | None,
    *,
    settings: BenchSettings,
    source: str | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure candidates on ``inputs``, held to what the original computes in eager fp32 where there is one.

    Raises:
        UsageError: no candidates, or a setting that makes no sense.
        DataError: the inputs do not fit the original.

    """
    known = reference_of(original, inputs) if original is not None else None
    if known is not None:
        costs = {"flops": known.flops or None, "bytes_moved": known.bytes_moved or None}
        candidates = [replace(candidate, **costs) for candidate in candidates]  # type: ignore[arg-type]
    return run_bench(
        candidates,
        _arrays(inputs),
        known.outputs if known else None,
        valid=known.valid if known else None,
        settings=settings,
        source=source,
        progress=progress,
    )


def measured_speedup(
    before: Program, after: Program, target: str, inputs: Mapping[str, torch.Tensor], settings: BenchSettings
) -> tuple[float, float]:
    """Lower two programs by default forms and return the interval of the second one's speed-up over the first.

    Raises:
        LoweringError: one of them cannot be lowered.
        MeasurementError: one of them cannot be run.

    """
    from xformopt.lowering import lower

    artifacts = [lower(program, target, measure=False) for program in (before, after)]
    candidates = [
        replace(artifact_candidate(artifact, name), max_relative_l2=float("inf"))
        for artifact, name in zip(artifacts, ("before", "after"), strict=True)
    ]
    report = run_bench(candidates, _arrays(inputs), settings=replace(settings, profile_rounds=0, over="before"))
    for run in report.runs:
        if run.error is not None:
            raise MeasurementError(f'The program {run.name} the pass could not be timed on "{target}": {run.error}')
    speedup = report.runs[1].speedup
    return (speedup.ci95 or (speedup.ratio, speedup.ratio)) if speedup else (0.0, float("inf"))


def measured_times(programs: Mapping[str, Program], target: str, *, threads: int | None = None) -> dict[str, float]:
    """Lower small programs by default forms and return their median milliseconds, rounds interleaved in this process.

    Args:
        programs: By name; each runs on inputs drawn at the sizes of its example.
        target: What to lower to.
        threads: Of every session; None takes torch's own number.

    Raises:
        LoweringError: one of them cannot be lowered.
        MeasurementError: one of them cannot be run.

    """
    from xformopt.lowering import lower, open_runner
    from xformopt.measure.timing import time_interleaved

    artifacts = {name: lower(program, target, measure=False) for name, program in programs.items()}
    calls = {}
    for name, artifact in artifacts.items():
        runner = open_runner(target, artifact.folder, threads=threads or torch.get_num_threads())
        arrays = _arrays(sample_inputs(programs[name], example_sizes(programs[name])))
        calls[name] = partial(runner.run, arrays)
    return {name: samples.median_ms for name, samples in time_interleaved(calls).items()}


def onnx_inputs(path: Path, batch: int | None, length: int | None, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw inputs for an ONNX file whose original is not known.

    The first axis is the batch (1), any other open axis a length (128).  Integers are 0 or 1, which every table has;
    masks are ones.

    Raises:
        ArtifactError: the file is not an ONNX model.
        MissingExtraError: the package ``onnx`` is not installed.

    """
    from xformopt.lowering.onnx_export import require_onnx

    require_onnx("Reading the inputs of an ONNX file")
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read as an ONNX model ({error}). Restore the file.") from error
    generator = torch.Generator().manual_seed(seed)
    weights = {initializer.name for initializer in graph.initializer}
    values = {}
    for value in graph.input:
        if value.name in weights:
            continue
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value or ((batch or 1) if i == 0 else length or _DEFAULT_LENGTH) for i, dim in enumerate(dims)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        values[value.name] = _drawn(value.name, shape, np.dtype(dtype), generator)
    return values


def _drawn(name: str, shape: list[int], dtype: np.dtype[Any], generator: torch.Generator) -> torch.Tensor:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    if "mask" in name or dtype.kind == "b":
        return torch.ones(shape, dtype=kind)
    if dtype.kind in "iu":
        return torch.randint(0, 2, shape, generator=generator).to(kind)
    return torch.randn(shape, generator=generator).to(kind)


def reference_of(original: Program, inputs: Mapping[str, torch.Tensor]) -> Reference:
    """Run the original in eager fp32, and count what that costs.

    Raises:
        DataError: the inputs do not fit it.

    """
    sizes = original.bind(inputs)
    with torch.inference_mode():
        outputs = original.run(inputs)
    valid = {}
    for spec, node in zip(original.outputs, original.results, strict=True):
        kept = valid_positions(original, node.meta["val"], inputs)
        if kept is not None:
            valid[spec.name] = _over_leading_axes(kept, outputs[spec.name]).numpy()
    counted = cost(original, sizes)
    moved = sum(tensor.nbytes for tensor in (*inputs.values(), *outputs.values())) + _streamed_bytes(original)
    return Reference(_arrays(outputs), valid, counted.flops, moved)


def _over_leading_axes(kept: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return a broadcastable mask as one over the leading axes of its output, as far as it varies."""
    while kept.dim() > 1 and kept.shape[-1] == 1:
        kept = kept.squeeze(-1)
    return kept.expand(output.shape[: kept.dim()]).contiguous()


def _streamed_bytes(program: Program) -> int:
    """Count the bytes of parameters that a run reads whole; of a table only the rows looked up are read."""
    total = 0
    for node in program.graph.find_nodes(op="get_attr"):
        if not all(_is_gather(user, node) for user in node.users):
            total += program.parameters[str(node.target)].nbytes
    return total


def _is_gather(user: fx.Node, table: fx.Node) -> bool:
    name = getattr(user.target, "_opname", "")
    if name == "quantized_embedding":
        return table is not user.args[1]
    return name in _GATHERS and bool(user.args) and user.args[0] is table


def _arrays(values: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: value.detach().cpu().contiguous().numpy() for name, value in values.items()}


def as_tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return arrays or tensors as tensors."""
    return {
        name: value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        for name, value in inputs.items()
    }
