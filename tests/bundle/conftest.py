"""Artifacts of one small model, packed and unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from xformopt.bundle.pack import write_bundle
from xformopt.lowering import lower
from xformopt.program import Program

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = """
program "small" lifted
dim batch in [1, inf]
dim length in [1, 64]
input %ids: i64[batch,length] below 20
input %mask: i64[batch,length]
param %table: f32[20,8]
param %w: f32[8,8]
param %b: f32[8]
%x: f32[batch,length,8] = aten.embedding(%table, %ids)
%y: f32[batch,length,8] = xf.linear(%x, %w, %b)
return hidden=%y valid keep %mask
"""


@pytest.fixture(scope="session")
def small() -> Program:
    return Program.parse(SMALL)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact that holds its original, one that does not, and one of another model."""
    folder = tmp_path_factory.mktemp("artifacts")
    program = Program.parse(SMALL)
    artifact = lower(program, measure=False, captured=program)
    artifact.save(folder / "whole")
    artifact.save(folder / "bare", program=False)
    lower(Program.parse(SMALL.replace("hidden=", "other=")), measure=False).save(folder / "other")
    return folder


@pytest.fixture(scope="session")
def packed(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "bundle.zip"
    write_bundle([artifacts / "whole", artifacts / "bare"], path, batch=2, length=5)
    return path


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "bundle")
    return tmp_path / "bundle"
