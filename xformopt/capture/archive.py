"""Read a `.pt2` archive, having checked every entry first.

`torch.export.load` unpickles some entries without restriction, loads compiled code from others and evaluates
text in the graph itself, so a doctored file could run anything. Here the whole archive is judged first.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xformopt.capture.serialized import Unsafe, check_graph
from xformopt.capture.source import check_finite_tensors
from xformopt.errors import CaptureError

if TYPE_CHECKING:
    import torch

__all__ = ["check_pt2", "load_pt2"]

GRAPH = "models/model.json"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
PICKLES = ("data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt")
MARKERS = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
EXTRA = re.compile(r"extra/[\w.\-/]+")
ENCRYPTED = 0x1


def load_pt2(path: str | Path) -> torch.export.ExportedProgram:
    """Check an archive entry by entry, then load it.

    Raises:
        CaptureError: The file is damaged or not a `.pt2`, holds more than a graph and tensors, uses operators
            that are not registered, or has parameters that are not finite.

    """
    import torch

    path = Path(path)
    check_pt2(path)
    try:
        with _quiet("torch.export"), _quiet("torch._export"):
            program = torch.export.load(str(path))
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[-1].strip().rstrip(".")
        raise CaptureError(
            f'"{path}" is a .pt2 archive, but the installed torch {torch.__version__} cannot load it: '
            f"{type(error).__name__}: {reason[:300]}. Export it again with this version, and import the "
            "package that registers its custom operators first if it has any."
        ) from error
    names = set(program.graph_signature.parameters)
    state = program.state_dict.items()
    check_finite_tensors(
        ((name, tensor) for name, tensor in state if name in names),
        ((name, tensor) for name, tensor in state if name not in names),
        f'"{path}"',
    )
    return program


def check_pt2(path: str | Path) -> None:
    """Make sure that loading a `.pt2` can only produce a graph and tensors.

    Raises:
        CaptureError: Naming the entry that is damaged, unknown or could run code.

    """
    path = Path(path)
    names = _check_zip(path)
    _check_names(path, names)
    # the reader that torch will load with: another reading of the same bytes could show other entries
    reader = _open(path)
    if set(reader.get_all_records()) != names:
        raise _refusal(path, "its table of contents", "reads differently to two readers of the format")
    if reader.get_record("archive_format") != b"pt2":
        raise _refusal(path, "archive_format", 'does not say "pt2"')
    try:
        check_graph(_parse(path, reader, GRAPH))
    except Unsafe as unsafe:
        raise _refusal(path, GRAPH, f"holds {unsafe}") from unsafe
    except RecursionError as error:
        raise _refusal(path, GRAPH, "is nested too deep") from error
    for config in CONFIGS:
        if config in names:
            _check_config(path, reader, config, names)
    for name in sorted(names & set(PICKLES)):
        _check_pickle(path, name, reader.get_record(name))


def _check_zip(path: Path) -> set[str]:
    """Check the container: plain stored files in one folder. Returns the entries' names below that folder."""
    if not path.is_file():
        raise CaptureError(f'There is no file "{path}": expected a .pt2 archive written by torch.export.save.')
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CaptureError(
            f'"{path}" is not a .pt2 archive: it is truncated or no zip file at all ({error}). Expected what '
            "torch.export.save writes; copy or export it again."
        ) from error
    if "version" in {entry.filename for entry in entries}:
        raise _refusal(path, "version", "marks the format of torch 2.7 and older, which is pickled throughout")
    names = [entry.filename for entry in entries]
    for entry in entries:
        if problem := _zip_problem(entry, path.stat().st_size):
            raise _refusal(path, entry.filename, problem)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _refusal(path, twice, "occurs twice")
    if len({name.split("/", 1)[0] for name in names}) != 1 or not all("/" in name for name in names):
        raise CaptureError(
            f'"{path}" is a zip file but not a .pt2 archive, whose entries lie in one folder. Expected what '
            "torch.export.save writes."
        )
    return {name.split("/", 1)[1] for name in names}


def _zip_problem(entry: zipfile.ZipInfo, archive_size: int) -> str:
    name = entry.filename
    if name.startswith("/") or "\\" in name or ":" in name or not {"..", ".", ""}.isdisjoint(name.split("/")):
        return "has a path that leaves the archive"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    if entry.compress_type != zipfile.ZIP_STORED:
        return "is compressed, which torch.export.save never does"
    if entry.file_size != entry.compress_size or entry.file_size > archive_size:
        return f"claims {entry.file_size} bytes, more than the archive holds"
    return ""


def _check_names(path: Path, names: set[str]) -> None:
    for required in (GRAPH, "archive_format", "archive_version", "data/sample_inputs/model.pt"):
        if required not in names:
            raise CaptureError(
                f'"{path}" is a zip file but not a .pt2 archive of one exported program: the entry '
                f'"{required}" is missing. Expected what torch.export.save writes.'
            )
    known = {GRAPH, *CONFIGS, *PICKLES, *MARKERS}
    for name in sorted(names - known):
        if name.startswith("data/aotinductor/"):
            raise _refusal(path, name, "is compiled code, which would run on loading")
        if not TENSORS.fullmatch(name) and not EXTRA.fullmatch(name):
            raise _refusal(path, name, "is not among the entries of an exported program")


def _check_config(path: Path, reader: Any, config: str, names: set[str]) -> None:
    """Check a table of tensors: raw ones are as long as their shape says, pickled ones hold only tensors."""
    table = _parse(path, reader, config)
    folder = config.rpartition("/")[0]
    if not isinstance(table, dict) or not isinstance(table.get("config"), dict):
        raise _refusal(path, config, "is not a table of tensors")
    for tensor, payload in table["config"].items():
        name = f"{folder}/{payload.get('path_name')}" if isinstance(payload, dict) else ""
        if name not in names or not TENSORS.fullmatch(name):
            raise _refusal(path, config, f'stores "{tensor}" as "{name}", which is no raw tensor of the archive')
        if payload.get("use_pickle") is not False:
            _check_pickle(path, name, reader.get_record(name))
        elif reader.get_record_size(name) == 0 and _elements(payload) != 0:
            raise _refusal(path, name, f'is empty, but "{tensor}" has elements')


def _elements(payload: dict[str, Any]) -> int:
    try:
        return math.prod(int(size["as_int"]) for size in payload["tensor_meta"]["sizes"])
    except (KeyError, TypeError, ValueError):
        return -1


def _check_pickle(path: Path, name: str, data: bytes) -> None:
    """Accept only what torch's own restricted unpickler accepts: tensors in plain containers."""
    import torch

    if not data:
        return
    if data[:2] == b"PK" and any(entry.compress_type for entry in _nested(path, name, data)):
        raise _refusal(path, name, "is compressed, which torch.save never does")
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refusal(path, name, "is pickled and holds more than tensors, so loading it could run code") from error


def _nested(path: Path, name: str, data: bytes) -> Iterable[zipfile.ZipInfo]:
    try:
        return zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _refusal(path, name, "is damaged") from error


def _open(path: Path) -> Any:
    import torch

    try:
        return torch._C.PyTorchFileReader(str(path))
    except RuntimeError as error:
        raise CaptureError(
            f'"{path}" is a zip file that torch cannot read as an archive: it is truncated or not a .pt2. '
            "Expected what torch.export.save writes; copy or export it again."
        ) from error


def _parse(path: Path, reader: Any, name: str) -> Any:
    try:
        return json.loads(reader.get_record(name))
    except (ValueError, RecursionError, RuntimeError) as error:
        raise _refusal(path, name, "is not valid JSON") from error


def _refusal(path: Path, entry: str, problem: str) -> CaptureError:
    return CaptureError(
        f'The entry "{entry}" of "{path}" {problem}; refusing to load the archive. A .pt2 written by '
        "torch.export.save for plain tensors has no such entry: export the model again, or give the model "
        "itself."
    )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from logging tracebacks of errors that are reported here."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
