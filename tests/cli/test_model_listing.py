"""The listing of models is counted once, and kept for as long as what it depends on stays the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xformopt import model_listing
from xformopt.model_listing import ModelInfo, list_models


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Describe one model instead of all of them; how often that happened."""
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    times: list[int] = []

    def described() -> list[ModelInfo]:
        times.append(1)
        return [ModelInfo("small", "one", ("here",), None, 0, {"x": [1, 2]}, 3, flops=times[0] * 5)]

    monkeypatch.setattr(model_listing, "_described", described)
    return times


def test_models_are_counted_once(counted: list[int]) -> None:
    first = list_models()
    assert list_models() == first
    assert first[0].sources == ("here",)
    assert len(counted) == 1


def test_a_damaged_answer_is_found_again(counted: list[int], tmp_path: Path) -> None:
    first = list_models()
    (kept,) = (tmp_path / "models").iterdir()
    for damaged in ("[", "[3]", json.dumps([{"name": "x"}])):
        kept.write_text(damaged)
        assert list_models() == first
    assert len(counted) == 4


def test_a_change_of_the_source_counts_again(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    list_models()
    monkeypatch.setattr(model_listing.importlib.metadata, "version", lambda name: "another")
    list_models()
    assert len(counted) == 2


def test_a_model_without_its_extra_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path))
    missing = ModelInfo("small", "one", (), None, 0, {}, None, None)
    monkeypatch.setattr(model_listing, "_described", lambda: [missing])
    assert list_models() == [missing]
    assert not (tmp_path / "models").exists()


def test_a_folder_that_cannot_be_written_costs_only_time(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XFORMOPT_CACHE", str(tmp_path / "file"))
    assert list_models() == list_models()
    assert len(counted) == 2


def test_what_is_kept_is_listed_without_torch(counted: list[int]) -> None:
    list_models()
    code = "import sys; from xformopt.model_listing import list_models; print(list_models(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout
    assert done.stdout.endswith("False\n")
