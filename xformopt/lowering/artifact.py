"""An artifact: the folder that a lowered program becomes, and the session that runs it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xformopt.errors import ArtifactError, DataError, OutputError
from xformopt.files import staged_directory
from xformopt.lowering.manifest import (
    FILE_NAME,
    FileEntry,
    InputSpec,
    Manifest,
    check_files,
    hash_file,
    read_manifest,
)
from xformopt.lowering.onnx_files import check_external_data
from xformopt.lowering.ort_session import ORT_TARGETS, OrtSession
from xformopt.program import Program, load_program, save_program

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Artifact", "Session", "Workspace", "complete_inputs", "copy_extra", "load_artifact"]

_PROGRAM = "program"
_NUMPY = {"f64": "float64", "f32": "float32", "f16": "float16", "bool": "bool", "u8": "uint8"} | {
    f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)
}


class Session(Protocol):
    """What runs an artifact's model."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once."""
        ...


class Workspace:
    """A private folder that vanishes with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="xformopt-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Artifact:
    """A lowered program, ready to run and to be saved.

    Attributes:
        manifest: What ``artifact.json`` says.
        folder: Where its files lie; a private folder until :meth:`save`, which writes another.
        captured: The original Program, where it is at hand.

    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        captured: Program | None = None,
        threads: int | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.manifest, self.folder, self.captured, self.threads = manifest, folder, captured, threads
        # the private folder lives as long as this object
        self._workspace = workspace

    @property
    def target(self) -> str:
        """The target it was lowered for."""
        return self.manifest.target

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(spec.name for spec in self.manifest.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(spec.name for spec in self.manifest.outputs)

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.folder / self.manifest.model

    @property
    def size_bytes(self) -> int:
        """Bytes of the model's files."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{self.manifest.model}*"))

    @cached_property
    def session(self) -> Session:
        """The opened model."""
        return open_session(self.target, self.model_path, self.manifest, self.threads)

    def run(self, **arrays: npt.ArrayLike) -> dict[str, np.ndarray]:
        """Run on named arrays, defaults where they are left out, and return the named outputs.

        Raises:
            DataError: a missing or unknown input, a wrong dtype or rank, or sizes that do not fit the dimensions.

        """
        given = complete_inputs(self.manifest, {name: np.asarray(value) for name, value in arrays.items()})
        _check_inputs(self.manifest, given)
        found = self.session.run(given)
        return {name: found[name] for name in self.output_names}

    def original(self, *, verify: bool = True) -> Program:
        """Return the captured Program it was made from.

        Raises:
            ArtifactError: it was saved without the Program, or the Program is damaged.

        """
        if self.captured is not None:
            return self.captured
        if not (self.folder / _PROGRAM).is_dir():
            raise ArtifactError(
                f"{self.folder} holds no Program of the original (it was written with --no-program), "
                f"so it cannot be compared with it. Name the original model instead."
            )
        return load_program(self.folder / _PROGRAM, verify=verify)

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        program: bool = True,
        documents: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Write the artifact to ``path``, whole or not at all, and return it as loaded from there.

        Args:
            path: The folder to make.
            overwrite: Whether an artifact that exists there is replaced.
            program: Whether to store the original Program too, as large again as the weights.
            documents: Further text files by name, such as ``bench.json``.

        Raises:
            OutputError: the path exists, cannot be written, or the disk is full.

        """
        with staged_directory(path, overwrite, marker=FILE_NAME) as staged:
            for name in _files_under(self.folder):
                if program or not name.startswith(f"{_PROGRAM}/"):
                    self._place(name, staged)
            if program and self.captured is not None and not (staged / _PROGRAM).exists():
                save_program(self.captured, staged / _PROGRAM)
            for name, text in (documents or {}).items():
                (staged / name).write_text(text, encoding="utf-8")
            manifest = self.manifest.model_copy(update={"files": hash_files(staged)})
            (staged / FILE_NAME).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        return Artifact(manifest, Path(path).expanduser().resolve(), captured=self.captured, threads=self.threads)

    def _place(self, name: str, staged: Path) -> None:
        source, destination = self.folder / name, staged / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if self._workspace is not None:
            # nobody else sees the private folder, so its files may be shared instead of copied
            try:
                os.link(source, destination)
                return
            except OSError:
                pass
        shutil.copyfile(source, destination)


def load_artifact(path: str | Path, *, threads: int | None = None, verify: bool = True) -> Artifact:
    """Open an artifact directory and its session, with the settings stored in it.

    Args:
        path: The folder.
        threads: Threads inside operators; None leaves the choice to the runtime.
        verify: Whether to compare every file with its recorded SHA-256.

    Raises:
        ArtifactError: no artifact, another version, a missing or changed file, or a model that refers outside of it.
        MissingExtraError: the target's runtime is not installed.

    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    if manifest.model not in manifest.files:
        raise ArtifactError(
            f"{folder / FILE_NAME} names the model {manifest.model!r} but does not list it. Do not use it."
        )
    if verify:
        check_files(folder, manifest.files)
    if Path(manifest.model).suffix == ".onnx":
        check_external_data(folder / manifest.model)
    artifact = Artifact(manifest, folder.resolve(), threads=threads)
    _ = artifact.session
    return artifact


def open_session(target: str, path: Path, manifest: Manifest, threads: int | None) -> Session:
    """Open a model file in the runtime of its target."""
    if target == "openvino-cpu":
        from xformopt.lowering.openvino import OpenVinoSession

        return OpenVinoSession(path, threads=threads)
    if target.startswith("tvm-"):
        from xformopt.lowering.tvm_session import TvmSession

        return TvmSession(path, threads=threads)
    if target == "triton-cuda":
        from xformopt.lowering.triton_session import TritonSession

        return TritonSession(path)
    if target in ORT_TARGETS:
        return OrtSession(path, manifest.session, threads=threads, target=target)
    raise ArtifactError(
        f"{path.parent} was made for the target {target!r}, which this version of xformopt does not run. "
        f"Use the version that wrote it ({manifest.xformopt})."
    )


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Return every file under ``folder`` by its relative name, but the manifest."""
    return {name: hash_file(folder / name) for name in _files_under(folder)}


def _files_under(folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != FILE_NAME]


def copy_extra(files: tuple[Path, ...], folder: Path) -> None:
    """Copy files of the source (tokenizer, processor) beside the model.

    Raises:
        OutputError: a file is missing, or has the name of one of the artifact's own.

    """
    for file in files:
        if not file.is_file():
            raise OutputError(
                f"{file} is to be copied into the artifact but is not a file. Leave it out, or restore it."
            )
        if (folder / file.name).exists() or file.name in (FILE_NAME, _PROGRAM):
            raise OutputError(f"{file} has the name of one of the artifact's own files. Rename it, or leave it out.")
        shutil.copyfile(file, folder / file.name)


def complete_inputs(manifest: Manifest, given: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Add the defaults of inputs that were left out; a dimension that only those have is as large as it may be."""
    left_out = [spec for spec in manifest.inputs if spec.default is not None and spec.name not in given]
    if not left_out:
        return given
    sizes = {dim.name: dim.high or dim.low for dim in manifest.dims}
    for spec in manifest.inputs:
        if spec.name in given:
            sizes |= {str(size): have for size, have in zip(spec.shape, given[spec.name].shape, strict=False)}
    found = dict(given)
    for spec in left_out:
        shape, dtype = [size if isinstance(size, int) else sizes[size] for size in spec.shape], _NUMPY[spec.dtype]
        ascending = np.arange(shape[-1], dtype=dtype)
        found[spec.name] = (
            np.zeros(shape, dtype) if spec.default == "zeros" else np.broadcast_to(ascending, shape).copy()
        )
    return found


def _check_inputs(manifest: Manifest, given: Mapping[str, np.ndarray]) -> None:
    names = [spec.name for spec in manifest.inputs]
    if missing := [name for name in names if name not in given]:
        raise DataError(
            f"Input {missing[0]!r} is missing: {manifest.name} takes {', '.join(names)}; "
            f"given: {', '.join(given) or 'nothing'}."
        )
    if unknown := [name for name in given if name not in names]:
        raise DataError(f"There is no input {unknown[0]!r}: {manifest.name} takes {', '.join(names)}.")
    sizes: dict[str, int] = {}
    for spec in manifest.inputs:
        _check_input(manifest, spec, given[spec.name], sizes)


def _check_input(manifest: Manifest, spec: InputSpec, array: np.ndarray, sizes: dict[str, int]) -> None:
    expected = f"{spec.name} must be {_NUMPY.get(spec.dtype, spec.dtype)}[{', '.join(map(str, spec.shape))}]"
    if array.dtype.name != _NUMPY.get(spec.dtype, spec.dtype) or array.ndim != len(spec.shape):
        raise DataError(f"{expected}, but is {array.dtype.name}{list(array.shape)}. Convert it first.")
    ranges = {dim.name: dim for dim in manifest.dims}
    for axis, (want, have) in enumerate(zip(spec.shape, array.shape, strict=True)):
        wanted = sizes.setdefault(want, have) if isinstance(want, str) else want
        if wanted != have:
            raise DataError(f"{expected}, but axis {axis} of {list(array.shape)} is {have} instead of {wanted}.")
        if isinstance(want, str):
            dim = ranges[want]
            if have < dim.low or (dim.high is not None and have > dim.high):
                high = "inf" if dim.high is None else dim.high
                raise DataError(f"{expected} with {want} in [{dim.low}, {high}], but axis {axis} is {have}.")
