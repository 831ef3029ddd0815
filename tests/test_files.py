"""Output is whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xformopt.errors import OutputError
from xformopt.files import staged_directory, write_atomically


def nothing_left(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["report.json"]


def test_writes_through_a_link_and_to_a_device(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    write_atomically("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()


def test_a_file_cannot_take_the_place_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a directory"):
        write_atomically(tmp_path, "x")


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file is a file, not a directory"):
        write_atomically(tmp_path / "file" / "report.json", "x")
    with (
        pytest.raises(OutputError, match=r"file is a file, not a directory"),
        staged_directory(tmp_path / "file" / "a" / "b"),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_atomically(tmp_path / "new" / "report.json", "x")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="cannot write"), staged_directory(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(tmp_path / "new" / "report.json", "x")


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with staged_directory(out) as staged:
        (staged / "model.onnx").write_text("weights")
        assert not out.exists()
    assert (out / "model.onnx").read_text() == "weights"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_directory_that_fails_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    def interrupted() -> None:
        with staged_directory(tmp_path / "a" / "out") as staged:
            (staged / "half").write_text("x")
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (28)"),
    ],
)
def test_a_disk_that_fills_inside_the_block(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OutputError, match="disk is full"), staged_directory(tmp_path / "out"):
        raise error
    assert nothing_left(tmp_path)


def test_an_unrelated_refusal_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged_directory(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else/model.safetensors")


def test_what_exists_stays_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"), staged_directory(tmp_path / "out"):
        pass


def test_overwrite_replaces_an_artifact_and_keeps_it_on_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "artifact.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_directory(out, overwrite=True):
        raise KeyboardInterrupt
    assert (out / "artifact.json").read_text() == "old"
    with staged_directory(out, overwrite=True) as staged:
        (staged / "new").write_text("x")
    assert os.listdir(out) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_replaces_a_file_and_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty"):
        with staged_directory(tmp_path / name, overwrite=True) as staged:
            (staged / "new").write_text("x")
        assert os.listdir(tmp_path / name) == ["new"]


def test_overwrite_does_not_wipe_out_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match="not written by xformopt"),
        staged_directory(tmp_path, overwrite=True),
    ):
        pass
    assert (tmp_path / "thesis.tex").exists()
