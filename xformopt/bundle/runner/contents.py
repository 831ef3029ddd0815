"""What a bundle holds, read from ``bundle.json`` and checked against it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xformopt.errors import ArtifactError
from xformopt.measure.contest import Candidate
from xformopt.measure.runner import Array

__all__ = ["FORMAT", "INDEX", "Contents", "read_contents"]

FORMAT = "xformopt/bundle/1"
INDEX = "bundle.json"


@dataclass(frozen=True)
class Contents:
    """A bundle whose files are what they were when it was made.

    Attributes:
        candidates: The artifacts, opened by their folders.
        inputs: What each runs on, by input name.
        expected: What the original computes in eager fp32, or the first artifact where no original was at hand.
        valid: For outputs with padding, which positions count.
        source: The model, for the report's headline.
        reference: ``given`` where ``expected`` is the original's, else the name of the artifact it came from.

    """

    candidates: tuple[Candidate, ...]
    inputs: dict[str, Array]
    expected: dict[str, Array]
    valid: dict[str, Array]
    source: str | None
    reference: str


def read_contents(root: Path) -> Contents:
    """Read the bundle unpacked at ``root``.

    Raises:
        ArtifactError: it is not a bundle, one of another version, or a file is missing or was changed.

    """
    index = _read_index(root)
    for name, entry in index["files"].items():
        _check_file(root, name, entry)
    return Contents(
        candidates=tuple(_candidate(root, values) for values in index["artifacts"]),
        inputs=_read_arrays(root / "inputs.npz"),
        expected=_read_arrays(root / "expected.npz"),
        valid=_read_arrays(root / "valid.npz"),
        source=index["source"],
        reference=index["reference"],
    )


def _read_index(root: Path) -> dict[str, Any]:
    try:
        index: Any = json.loads((root / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{root} is not a bundle: {INDEX} cannot be read ({error}). Unpack the bundle again, whole."
        ) from error
    declared = index.get("format") if isinstance(index, dict) else None
    if not isinstance(index, dict) or declared != FORMAT:
        raise ArtifactError(
            f"{root / INDEX} has the format {declared!r}, and this runner reads {FORMAT!r}. Make the bundle again."
        )
    return index


def _check_file(root: Path, name: str, entry: dict[str, Any]) -> None:
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        raise ArtifactError(f"{INDEX} lists {name!r}, which is not a file of the bundle. Do not use it.")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing, and {INDEX} lists it. Unpack the bundle again, whole.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry["sha256"]:
        raise ArtifactError(
            f"{path} was changed after the bundle was made: its SHA-256 is {found[:16]}..., and "
            f"{entry['sha256'][:16]}... is recorded. Nothing was run. Unpack the bundle again."
        )


def _candidate(root: Path, values: dict[str, Any]) -> Candidate:
    return Candidate(
        name=values["name"],
        target=values["target"],
        path=root / values["folder"],
        precision=values["precision"],
        flops=values["flops"],
        bytes_moved=values["bytes_moved"],
        # a lossy artifact is measured whatever its distance, which the report states
        max_relative_l2=float("inf") if values["lossy"] else None,
    )


def _read_arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
