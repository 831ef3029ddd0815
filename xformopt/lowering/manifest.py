"""What ``artifact.json`` holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import fx

from xformopt.errors import ArtifactError
from xformopt.kernels.definition import Operator, find_operator
from xformopt.program import Program, value_of
from xformopt.program.precision import HALF_PRECISIONS
from xformopt.program.text import DTYPE_NAMES

__all__ = [
    "FORMAT",
    "DimSpec",
    "FileEntry",
    "InputSpec",
    "Manifest",
    "OutputSpec",
    "SessionSettings",
    "TuningRecord",
    "arithmetic_of",
    "execution_of",
    "half_precision_of",
    "hash_file",
    "precision_of",
    "read_manifest",
    "rounds_activations",
    "specs_of",
]

FORMAT = "xformopt/artifact/1"
FILE_NAME = "artifact.json"
_PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# what is stored in few bits and computed in float
_STORED = {
    "weight_only_linear": "linear layers",
    "shift_linear": "linear layers with powers of two",
    "ternary_linear": "linear layers with two or three values",
    "quantized_embedding": "tables of embeddings",
    "block_parameter": "parameters",
}
# what rounds a value to few levels that stay floats
_SIMULATED = frozenset({"fake_quantize", "log_quantize", "log_attention"})
_STORED_FLOATS = "float_weight_linear"
_SIMULATED_FLOATS = "fake_quantize_float"
_EXECUTED_FLOATS = "float8_linear"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DimSpec(_Model):
    """A dynamic dimension and its inclusive range; ``high`` is None when nothing bounds it."""

    name: str
    low: int
    high: int | None


class InputSpec(_Model):
    """An input; ``shape`` holds sizes and dimension names, ``bound`` the end of an integer input's range.

    An input with a ``default`` may be left out: it is then all zeros, or 0, 1, 2, ... along its last axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bound: int | None = None
    default: Literal["zeros", "ascending"] | None = None


class OutputSpec(_Model):
    """An output; sizes may be expressions in dimension names, ``mask`` names the input that says what is valid."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    mask: str | None = None
    mask_means: str = "keep"


class SessionSettings(_Model):
    """What an ONNX Runtime session is told besides its threads."""

    optimization_level: Literal["none", "basic", "extended", "layout", "all"] = "all"
    disabled_optimizers: tuple[str, ...] = ()
    inter_op_threads: int | None = None
    config: dict[str, str] = Field(default_factory=dict)


class TuningRecord(_Model):
    """One form that was tried: its time over that of the form kept until then, or why it was not timed."""

    operator: str
    form: str
    ratio: float | None = None
    relative_l2: float | None = None
    kept: bool = False
    note: str = ""


class FileEntry(_Model):
    """One file of the artifact."""

    sha256: str
    bytes: int


class Manifest(_Model):
    """All that is known of an artifact."""

    format: str = FORMAT
    xformopt: str
    name: str
    target: str
    model: str
    precision: str
    # how many layers execute in integers, or are only stored in few bits, and how many values are rounded in float
    execution: dict[str, int] = Field(default_factory=dict)
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    dims: tuple[DimSpec, ...]
    session: SessionSettings = SessionSettings()
    # how many nodes of each operator took each form
    forms: dict[str, dict[str, int]] = Field(default_factory=dict)
    tuning: tuple[TuningRecord, ...] = ()
    tuned_at: dict[str, int] = Field(default_factory=dict)
    fingerprint: str
    source: str | None = None
    history: tuple[Any, ...] = ()
    machine: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)


def specs_of(program: Program) -> dict[str, Any]:
    """Return the manifest's inputs, outputs and dims of a Program."""
    outputs = []
    for spec, node in zip(program.outputs, program.results, strict=True):
        value = value_of(node)
        shape = tuple(size if isinstance(size, int) else str(size) for size in program.dims.shape(value))
        outputs.append(
            OutputSpec(
                name=spec.name,
                dtype=DTYPE_NAMES[value.dtype],
                shape=shape,
                mask=spec.mask,
                mask_means=spec.mask_means,
            )
        )
    return {
        "inputs": tuple(
            InputSpec(
                name=spec.name,
                dtype=DTYPE_NAMES[spec.dtype],
                shape=spec.shape,
                bound=spec.bound,
                default=spec.default,
            )
            for spec in program.inputs
        ),
        "outputs": tuple(outputs),
        "dims": tuple(DimSpec(name=dim.name, low=dim.low, high=dim.high) for dim in program.dims),
    }


def precision_of(program: Program) -> str:
    """Name what the linear layers execute in, or else the narrowest way that weights are stored in.

    ``int8``: integer products.  ``int4-weights`` and its like: stored in so many bits, computed in float;
    ``shift5-weights`` where those are powers of two, ``fp4-weights`` and its like where they are floats.
    Otherwise the narrowest floating-point type among the weights, ``fp32`` where there are none.
    """
    arithmetic = arithmetic_of(program)
    stored = {_storage(defined.name, node) for defined, node in _xf_nodes(program)} - {None}
    if not stored or arithmetic == "int8":
        return arithmetic
    bits, kind = min(found for found in stored if found is not None)
    return f"{kind}{bits}-weights"


def _storage(operator: str, node: fx.Node) -> tuple[int, str] | None:
    """Return in how many bits of what kind an operator's weight is stored, if in few."""
    if operator == _EXECUTED_FLOATS:
        return 8, "fp"
    if operator == _STORED_FLOATS:
        return int(str(node.kwargs["format"]).split("_")[0].removeprefix("fp")), "fp"
    if operator in _STORED:
        return int(str(node.kwargs["bits"])), "shift" if operator == "shift_linear" else "int"
    return None


def arithmetic_of(program: Program) -> str:
    """Name the arithmetic of linear layers: ``int8``, or else the narrowest floating-point type among the weights."""
    # what scales are stored in says nothing of the arithmetic
    scales = {arguments[2].target for arguments in _stored_floats(program)}
    used = {tensor.dtype for name, tensor in program.parameters.items() if tensor.dim() > 1 and name not in scales}
    if any(defined.name == "quantized_linear" for defined, _ in _xf_nodes(program)):
        return "int8"
    return next((name for dtype, name in reversed(_PRECISIONS.items()) if dtype in used), "fp32")


def half_precision_of(program: Program) -> torch.dtype | None:
    """Return the type of 16 bits that weights are stored in, if they are."""
    used = {tensor.dtype for tensor in program.parameters.values() if tensor.dim() > 1}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in used), None)


def rounds_activations(program: Program) -> bool:
    """Whether values are rounded on the way: between two codes, the last bit of a value decides which it becomes."""
    rounding = {"quantized_linear", _SIMULATED_FLOATS, _EXECUTED_FLOATS, *_SIMULATED}
    return any(defined.name in rounding for defined, _ in _xf_nodes(program))


def execution_of(program: Program, *, in_half: bool = False, by_kernels: bool = False) -> dict[str, int]:
    """Count linear layers and tables by how they run: executed in few bits, or only stored in them.

    Activations in few bits are simulated: rounded, and kept in float.  ``in_half`` says that the target computes in 16
    bits what is to be computed so; ``by_kernels``, that linear layers are kernels of our own, which multiply 8-bit
    floats where there is an operator for it, and elsewhere make floats of stored weights whenever they run.
    """
    counted: Counter[str] = Counter()
    for defined, node in _xf_nodes(program):
        if defined.name == "quantized_linear":
            counted["linear layers executed in int8"] += 1
        elif defined.name in _STORED:
            counted[f"{_STORED[defined.name]} stored in {node.kwargs['bits']} bits, computed in float"] += 1
        elif defined.name == _STORED_FLOATS:
            when = "every call" if by_kernels else "load"
            counted[f"linear layers stored in {node.kwargs['format']}, made floats at {when}, computed in float"] += 1
        elif defined.name == _EXECUTED_FLOATS:
            counted[f"linear layers {'executed in fp8_e4m3' if by_kernels else 'in fp8_e4m3, simulated in float'}"] += 1
        elif defined.name in _SIMULATED:
            counted[f"activations in {node.kwargs['bits']} bits, simulated in float"] += 1
        elif defined.name == "ternary_weight":
            counted[f"weights in {node.kwargs['bits']} bits, simulated in float"] += 1
        elif defined.name == _SIMULATED_FLOATS:
            counted[f"activations in {node.kwargs['format']}, simulated in float"] += 1
        elif defined.name == "memory_linear":
            counted["linear layers as hashed tables, summed in float"] += 1
        elif defined.name == "sparse_factor_linear":
            counted["linear layers stored as sparse times dense, computed dense"] += 1
        elif defined.name in ("linear", "linear_activation"):
            counted[_computed_in(value_of(node).dtype, in_half)] += 1
    return dict(sorted(counted.items()))


def _computed_in(dtype: torch.dtype, in_half: bool) -> str:
    if dtype not in HALF_PRECISIONS:
        return "linear layers in float"
    name = _PRECISIONS[dtype]
    return f"linear layers in {name}" if in_half else f"linear layers stored in {name}, computed in fp32"


def _stored_floats(program: Program) -> Iterator[tuple[Any, ...]]:
    return (node.args for defined, node in _xf_nodes(program) if defined.name in (_STORED_FLOATS, _EXECUTED_FLOATS))


def _xf_nodes(program: Program) -> Iterator[tuple[Operator, fx.Node]]:
    for node in program.nodes():
        if (defined := find_operator(node.target)) is not None:
            yield defined, node


def read_manifest(folder: Path) -> Manifest:
    """Read ``artifact.json``.

    Raises:
        ArtifactError: the folder is no artifact, or one of another version, or the file is damaged.

    """
    path = folder / FILE_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{folder} is not an artifact: it has no readable {FILE_NAME} ({error.strerror}). "
            f"Name a folder that `xformopt optimize` or `xformopt export` wrote."
        ) from error
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(_explain(path, content, error)) from error
    if manifest.format != FORMAT:
        raise ArtifactError(_of_another_version(path, manifest.format))
    return manifest


def _explain(path: Path, content: bytes, error: ValidationError) -> str:
    import json

    try:
        declared = json.loads(content).get("format", "none")
    except (ValueError, AttributeError):
        return f"{path} is not valid JSON: it was cut short or edited. Restore it, or write the artifact again."
    if declared != FORMAT:
        return _of_another_version(path, declared)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the top level"
    return f"{path} is damaged at {where}: {first['msg']}. Restore it, or write the artifact again."


def _of_another_version(path: Path, declared: object) -> str:
    return (
        f"{path} has the format {declared!r}, and this version of xformopt reads {FORMAT!r}. "
        f"Write the artifact again with this version, or use the one that wrote it."
    )


def hash_file(path: Path) -> FileEntry:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)


def check_files(folder: Path, files: dict[str, FileEntry], names: Sequence[str] | None = None) -> None:
    """Compare files with their recorded hashes; all of them, or the named ones.

    Raises:
        ArtifactError: a file is missing, was changed, or lies outside of the folder.

    """
    for name in names if names is not None else files:
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise ArtifactError(
                f"{folder / FILE_NAME} lists {name!r}, which is not a file of its folder. Do not use it."
            )
        if not path.is_file():
            raise ArtifactError(
                f"{path} is missing, and {FILE_NAME} lists it. Copy the whole folder, or write it again."
            )
        found = path.stat().st_size
        if found != files[name].bytes or hash_file(path) != files[name]:
            raise ArtifactError(
                f"{path} was changed after the artifact was written ({found} bytes, {files[name].bytes} recorded; "
                f"the SHA-256 differs). Restore the file, or write the artifact again."
            )
