"""A Program survives the disk, and a damaged folder is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xformopt.errors import ArtifactError, OutputError, ProgramError
from xformopt.program import Program, load_program, save_program

TEXT = """
program "small" lifted
dim batch in [1, inf]
input %x: f32[batch,4]
param %first.w: f32[4,4]
param %second.w: f32[4,4]
param %steps: i64[3]
param %scale: bf16[]
%a: f32[batch,4] = xf.linear(%x, %first.w)  # first
%b: f32[batch,4] = xf.linear(%a, %second.w)  # second
%c: f32[batch,4] = aten.mul.Tensor(%b, %scale)
%d: i64[3] = aten.add.Tensor(%steps, %steps)
return y=%c, steps=%d
"""


@pytest.fixture
def program() -> Program:
    program = Program.parse(TEXT)
    program.example_inputs = {"x": torch.randn(2, 4)}
    return program


def test_round_trip_keeps_text_weights_and_examples(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "saved")
    loaded = load_program(tmp_path / "saved")
    assert str(loaded) == str(program)
    assert loaded.fingerprint == program.fingerprint
    assert torch.equal(loaded.example_inputs["x"], program.example_inputs["x"])
    x = program.example_inputs
    assert torch.equal(loaded.run(x)["y"], program.run(x)["y"])


def test_tied_weights_are_stored_once_and_come_back_tied(program: Program, tmp_path: Path) -> None:
    big = torch.randn(4, 4)
    program.parameters["first.w"] = program.parameters["second.w"] = big
    save_program(program, tmp_path / "saved")
    loaded = load_program(tmp_path / "saved").parameters
    assert loaded["first.w"].data_ptr() == loaded["second.w"].data_ptr()


def test_views_of_one_storage_are_stored_apart(program: Program, tmp_path: Path) -> None:
    whole = torch.randn(8, 4)
    program.parameters["first.w"], program.parameters["second.w"] = whole[:4], whole[2:6]
    save_program(program, tmp_path / "saved")
    loaded = load_program(tmp_path / "saved").parameters
    assert torch.equal(loaded["first.w"], whole[:4])
    assert torch.equal(loaded["second.w"], whole[2:6])


def test_an_existing_folder_is_kept(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "saved")
    with pytest.raises(OutputError, match="exists already"):
        save_program(program, tmp_path / "saved")
    save_program(program, tmp_path / "saved", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["program.txt", "weights.safetensors"])
def test_a_missing_file_is_named(program: Program, tmp_path: Path, name: str) -> None:
    save_program(program, tmp_path / "saved")
    (tmp_path / "saved" / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_program(tmp_path / "saved")


def test_cut_weights_are_refused(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "saved")
    path = tmp_path / "saved" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="cut short"):
        load_program(tmp_path / "saved")


def test_foreign_weights_are_refused(program: Program, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_program(program, tmp_path / "saved")
    save_file({"first.w": torch.zeros(4, 4)}, tmp_path / "saved" / "weights.safetensors")
    with pytest.raises(ArtifactError, match="format"):
        load_program(tmp_path / "saved")


def test_changed_weights_are_noticed(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "saved")
    path = tmp_path / "saved" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="changed afterwards"):
        load_program(tmp_path / "saved")
    assert load_program(tmp_path / "saved", verify=False).name == "small"


@pytest.mark.parametrize(("old", "new"), [("second.w: f32[4,4]", "second.w: f32[4,5]"), ("%steps: i64", "%steps: i32")])
def test_text_that_does_not_fit_the_weights_is_refused(program: Program, tmp_path: Path, old: str, new: str) -> None:
    save_program(program, tmp_path / "saved")
    path = tmp_path / "saved" / "program.txt"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ProgramError, match="do not hold this parameter"):
        load_program(tmp_path / "saved")
