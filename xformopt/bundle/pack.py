"""``bundle``: artifacts of one model, what they run on and should compute, and a runner, in one zip file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xformopt.bundle.runner.contents import FORMAT, INDEX
from xformopt.bundle.runner.sessions import TARGETS
from xformopt.comparison import artifact_candidate, reference_of, unique_names
from xformopt.errors import ArtifactError, UsageError
from xformopt.files import staged_file
from xformopt.lowering.artifact import Artifact, complete_inputs
from xformopt.lowering.manifest import FILE_NAME, check_files, read_manifest
from xformopt.lowering.onnx_files import check_external_data
from xformopt.original import chosen_inputs
from xformopt.program.storage import load_tensors

if TYPE_CHECKING:
    from xformopt.benchmark import Candidate
    from xformopt.measure.runner import Array

__all__ = ["Bundle", "write_bundle"]

# parts of xformopt that need nothing but numpy and a runtime, and go along under the name `runner`
_CARRIED = (
    *("errors.py", "benchmark_worker.py"),
    *(f"measure/{name}.py" for name in ("__init__", "child", "contest", "fidelity", "machine", "memory", "runner")),
    *(f"measure/{name}.py" for name in ("statistics", "summary", "timing")),
    *(f"lowering/{name}.py" for name in ("openvino", "ort_session", "session_runner")),
    *(f"lowering/{name}.py" for name in ("tvm_session", "tvm_signature")),
)
_RUNNER = ("__init__.py", "__main__.py", "contents.py", "remote.py", "sessions.py")
_IMPORT = re.compile(r"^(\s*(?:from|import) )xformopt\.(?:bundle\.runner\.)?", re.MULTILINE)
_EMPTY_PACKAGE = '"""Part of the runner."""\n'
# the same bundle has the same bytes, whenever it is made
_WHEN = (1980, 1, 1, 0, 0, 0)
_README = """\
A bench bundle of xformopt. On the machine to be measured, in this folder:

    pip install numpy {runtimes}
    python -m runner --json bench.json

or, with TVM installed here as well as there, where a server runs (python -m tvm.exec.rpc_server --host 0.0.0.0):

    python -m runner --rpc DEVICE:9090 --device "what it is called" --json bench.json

checks every file, runs each artifact on inputs.npz, compares it with expected.npz, and measures. Carry bench.json
back and put it beside those of other machines: xformopt report first.json second.json -o report.html
"""
_RUNTIMES = {"ort-cpu": "onnxruntime", "openvino-cpu": "openvino"}
_OTHER_RUNTIME = "apache-tvm"


@dataclass(frozen=True)
class Bundle:
    """What was packed: the artifacts by name, and notes for whoever asked."""

    path: Path
    names: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    """What every artifact runs on, and is held to."""

    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    valid: Mapping[str, Array]
    reference: str
    flops: float | None = None
    bytes_moved: float | None = None


def write_bundle(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    batch: int | None = None,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Bundle:
    """Pack artifact directories of one model.

    Args:
        folders: Artifact directories.
        output: The zip file to write.
        batch: Size of the batch; the original's example decides otherwise.
        length: Length of token inputs; like ``batch``.
        seed: Of inputs that are drawn.
        overwrite: Whether a file that exists there is replaced.

    Raises:
        UsageError: no folder, artifacts of several models, sizes without an original, or a target no bundle carries.
        ArtifactError: an artifact is damaged.
        OutputError: the file exists or cannot be written.

    """
    artifacts = [_open(Path(folder).expanduser()) for folder in folders]
    _check_alike(artifacts)
    candidates = unique_names([artifact_candidate(artifact, artifact.folder.name) for artifact in artifacts])
    data, notes = _data_of(artifacts, candidates, batch, length, seed)
    with staged_file(output, overwrite) as staged, zipfile.ZipFile(staged, "w", allowZip64=True) as archive:
        writer = _Writer(archive)
        entries = []
        for artifact, candidate in zip(artifacts, candidates, strict=True):
            folder = f"artifacts/{candidate.name}"
            for path in _files_of(artifact):
                writer.copy(path, f"{folder}/{path.name}")
            entries.append(_describe(candidate, folder, data))
        for name, arrays in (("inputs", data.inputs), ("expected", data.expected), ("valid", data.valid)):
            writer.write(f"{name}.npz", _npz(arrays))
        for name, text in _runner_sources():
            writer.write(name, text.encode())
        runtimes = " ".join(dict.fromkeys(_RUNTIMES.get(artifact.target, _OTHER_RUNTIME) for artifact in artifacts))
        writer.write("README.txt", _README.format(runtimes=runtimes).encode())
        index = {
            "format": FORMAT,
            "xformopt": importlib.metadata.version("xformopt"),
            "source": artifacts[0].manifest.source or artifacts[0].manifest.name,
            "reference": data.reference,
            "artifacts": entries,
            "files": dict(sorted(writer.files.items())),
        }
        writer.write(INDEX, json.dumps(index, indent=1).encode())
    return Bundle(Path(output), tuple(candidate.name for candidate in candidates), tuple(notes))


def _open(folder: Path) -> Artifact:
    """Check an artifact without opening its model, whose runtime may not be made for this machine."""
    manifest = read_manifest(folder)
    if manifest.target not in TARGETS:
        raise UsageError(
            f"{folder} was made for the target {manifest.target}, which a bundle cannot carry. "
            f"It carries: {', '.join(TARGETS)}."
        )
    check_files(folder, manifest.files)
    if manifest.model not in manifest.files:
        raise ArtifactError(f"{folder / FILE_NAME} does not list its model {manifest.model!r}. Write it again.")
    if Path(manifest.model).suffix == ".onnx":
        check_external_data(folder / manifest.model)
    return Artifact(manifest, folder.resolve())


def _check_alike(artifacts: Sequence[Artifact]) -> None:
    if not artifacts:
        raise UsageError("There is nothing to bundle. Name artifact directories that `xformopt optimize` wrote.")
    first = artifacts[0].manifest
    wanted = [(spec.name, spec.dtype) for spec in first.inputs], [spec.name for spec in first.outputs]
    for artifact in artifacts[1:]:
        manifest = artifact.manifest
        found = [(spec.name, spec.dtype) for spec in manifest.inputs], [spec.name for spec in manifest.outputs]
        if found != wanted:
            raise UsageError(
                f"{artifacts[0].folder} and {artifact.folder} do not take the same inputs to the same outputs, so they "
                f"are of two models and cannot be compared. Make a bundle of each."
            )


def _data_of(
    artifacts: Sequence[Artifact], candidates: Sequence[Candidate], batch: int | None, length: int | None, seed: int
) -> tuple[_Data, list[str]]:
    for artifact in artifacts:
        if (artifact.folder / "program").is_dir():
            original = artifact.original()
            sizes = [_size(artifacts, name, wanted) for name, wanted in (("batch", batch), ("length", length))]
            inputs = chosen_inputs(original, *sizes, seed=seed)
            known = reference_of(original, inputs)
            # the example may leave out inputs that have a default; a runtime on the device must be given them
            arrays = complete_inputs(artifact.manifest, {name: value.numpy() for name, value in inputs.items()})
            return _Data(arrays, known.outputs, known.valid, "given", known.flops, known.bytes_moved), []
    if batch is not None or length is not None:
        raise UsageError(
            "No artifact holds its original (all were written with --no-program), so the batch and length are those "
            "of their reference inputs. Leave --batch and --length out."
        )
    first = artifacts[0]
    stored = [load_tensors(first.folder / f"reference_{part}.safetensors")[0] for part in ("inputs", "outputs")]
    inputs_, outputs = ({name: value.numpy() for name, value in part.items()} for part in stored)
    note = f"no artifact holds its original: fidelity is to what {candidates[0].name} should compute"
    return _Data(inputs_, outputs, {}, candidates[0].name), [note]


def _size(artifacts: Sequence[Artifact], name: str, wanted: int | None) -> int | None:
    """Return the size of a dimension that artifacts are fixed to, or else the one that is wanted."""
    fixed = {dim.low for each in artifacts for dim in each.manifest.dims if dim.name == name and dim.low == dim.high}
    if wanted is not None:
        fixed.add(wanted)
    if len(fixed) > 1:
        raise UsageError(
            f"The {name} would have to be {' and '.join(map(str, sorted(fixed)))} at once: artifacts were compiled for "
            f"fixed sizes. Lower them for the same ones, and leave --{name} out."
        )
    return fixed.pop() if fixed else None


def _describe(candidate: Candidate, folder: str, data: _Data) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "target": candidate.target,
        "folder": folder,
        "precision": candidate.precision,
        "lossy": candidate.max_relative_l2 is not None,
        "flops": data.flops,
        "bytes_moved": data.bytes_moved,
    }


def _files_of(artifact: Artifact) -> list[Path]:
    model = artifact.manifest.model
    return [artifact.folder / FILE_NAME, *sorted(artifact.folder.glob(f"{model}*"))]


def _runner_sources() -> Iterator[tuple[str, str]]:
    """Yield the files of the package ``runner``: its own, and what it needs of xformopt, imported by that name."""
    package = resources.files("xformopt")
    for name in _RUNNER:
        yield f"runner/{name}", _relocated(package.joinpath(f"bundle/runner/{name}").read_text(encoding="utf-8"))
    for name in _CARRIED:
        yield f"runner/{name}", _relocated(package.joinpath(name).read_text(encoding="utf-8"))
    yield "runner/lowering/__init__.py", _EMPTY_PACKAGE


def _relocated(source: str) -> str:
    return _IMPORT.sub(r"\1runner.", source)


def _npz(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


class _Writer:
    """Writes members of a zip file, uncompressed as weights are, and keeps the hash of each."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, data: bytes) -> None:
        self._put(name, io.BytesIO(data))

    def copy(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            self._put(name, file)

    def _put(self, name: str, source: Any) -> None:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
        self.files[name] = {"sha256": digest, "bytes": size}
        with self.archive.open(zipfile.ZipInfo(name, _WHEN), "w", force_zip64=True) as member:
            shutil.copyfileobj(source, member)
