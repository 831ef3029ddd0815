"""Owns how output reaches the disk, whole or not at all, and where xformopt keeps things between runs."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from xformopt.errors import OutputError

__all__ = ["cache_folder", "check_output", "staged_directory", "staged_file", "write_atomically"]

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def cache_folder() -> Path:
    """Return where answers are kept between runs: the user's cache folder, or the folder ``XFORMOPT_CACHE`` names."""
    if named := os.environ.get("XFORMOPT_CACHE"):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("xformopt")


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one.

    A link is written through. A device or pipe (`/dev/stdout`) cannot be replaced and is written directly.

    Raises:
        OutputError: `path` is a directory, lies under a file, cannot be written, or the disk is full.

    """
    path = _resolved(Path(path))
    content = data.encode() if isinstance(data, str) else data
    if path.is_dir():
        raise OutputError(f"cannot write the file {path}: it is a directory. Name a file inside it, or another path.")
    if path.exists() and not path.is_file():
        with _told_clearly(path):
            path.write_bytes(content)
        return
    with _parents_of(path), _told_clearly(path):
        staged = _beside(path)
        try:
            _write_synced(staged, content)
            os.replace(staged, path)
            _sync(path.parent)
        finally:
            staged.unlink(missing_ok=True)


def check_output(path: str | Path, overwrite: bool = False, *, marker: str | None = "artifact.json") -> None:
    """Find out before long work whether `path` could be written; nothing is written.

    Args:
        path: The file or directory to be.
        overwrite: Whether what exists there may be replaced.
        marker: As for `staged_directory`, of a directory; None: `path` is to be a file.

    Raises:
        OutputError: What writing would raise, as far as that can be known now.

    """
    path = _resolved(Path(path))
    if marker is None and path.is_dir():
        raise OutputError(f"cannot write the file {path}: it is a directory. Name a file inside it, or another path.")
    _check_replaceable(path, overwrite, marker)
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir():
        raise OutputError(_under_a_file(path, nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(_not_writable(path, errno.EACCES))


@contextlib.contextmanager
def staged_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a path of the same name in a folder of its own; what lies there when the block ends is moved beside `path`.

    So a file and its companions (external data, `<name>.data`) arrive together, the file itself last.

    Raises:
        OutputError: `path` exists without `overwrite`, is a directory, cannot be written, or the disk is full.

    """
    path = _resolved(Path(path))
    check_output(path, overwrite, marker=None)
    with _parents_of(path), _told_clearly(path):
        staged = _beside(path)
        try:
            staged.mkdir()
            yield staged / path.name
            _sync_tree(staged)
            for file in sorted(staged.iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))
            _sync(path.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def staged_directory(
    path: str | Path, overwrite: bool = False, *, marker: str | None = "artifact.json"
) -> Iterator[Path]:
    """Give an empty directory that becomes `path` when the block ends, and vanishes if the block fails.

    Args:
        path: The directory to make; missing parents are made, and removed again on failure.
        overwrite: Whether what exists at `path` may be replaced; it stays until the new one is whole.
        marker: A file that a directory must hold to be replaced, so that `--overwrite` cannot wipe out
            something else; an empty directory may always be replaced. None: any directory may be.

    Raises:
        OutputError: `path` exists without `overwrite` or without the marker, lies under a file, cannot be
            written, or the disk is full.

    """
    path = _resolved(Path(path))
    _check_replaceable(path, overwrite, marker)
    with _parents_of(path), _told_clearly(path):
        staged = _beside(path)
        try:
            staged.mkdir()
            yield staged
            _sync_tree(staged)
            _put_in_place(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _resolved(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(
            f'cannot use "{path}" as an output path: {error}. Give a path that can be created.'
        ) from error


def _check_replaceable(path: Path, overwrite: bool, marker: str | None) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise OutputError(f"the output {path} exists already. Pass --overwrite to replace it, or name another path.")
    if path.is_file() or marker is None or (path / marker).is_file() or not any(path.iterdir()):
        return
    raise OutputError(
        f"the output {path} is a directory that was not written by xformopt (it has no {marker}), and "
        "replacing it would delete what it holds. Name another path, or empty the directory first."
    )


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the missing parents of `path`; remove them again if the block fails."""
    made: list[Path] = []
    try:
        with _told_clearly(path):
            for parent in reversed(path.parents):
                if parent.is_dir():
                    continue
                if parent.exists():
                    raise OutputError(_under_a_file(path, parent))
                parent.mkdir(exist_ok=True)
                made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _told_clearly(path: Path) -> Iterator[None]:
    """Turn a full disk, anywhere in the block, and a refusal to write near `path` into one paragraph each."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # libraries that write through their own runtime report a full disk by its text alone
        if code in _DISK_FULL or "no space left on device" in str(error).lower():
            raise OutputError(
                f"the disk is full: {path} could not be written, and nothing was left there. "
                "Free some space, or name a path on another disk."
            ) from error
        if code in _NOT_WRITABLE and _concerns(error, path.parent):
            raise OutputError(_not_writable(path, code)) from error
        raise


def _under_a_file(path: Path, parent: Path) -> str:
    return f"cannot write {path}: {parent} is a file, not a directory. Name a path under a directory."


def _not_writable(path: Path, code: int) -> str:
    return (
        f"cannot write {path}: {os.strerror(code)}. "
        "Name a path that you may write to, or change the permissions of its folder."
    )


def _concerns(error: Exception, folder: Path) -> bool:
    name = getattr(error, "filename", None)
    if not isinstance(name, str | os.PathLike):
        return False
    named = Path(name)
    return named == folder or folder in named.parents or named in folder.parents


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(path: Path) -> None:
    """Flush one file or directory to disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _put_in_place(staged: Path, path: Path) -> None:
    """Rename `staged` to `path`; what was there is moved aside first and put back if the rename fails."""
    if not path.exists():
        os.rename(staged, path)
        _sync(path.parent)
        return
    aside = _beside(path)
    os.rename(path, aside)
    try:
        os.rename(staged, path)
    except BaseException:
        os.rename(aside, path)
        raise
    _sync(path.parent)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
