"""An artifact runs, survives the disk, and refuses to open when anything in it is not what was written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from xformopt.errors import ArtifactError, DataError, OutputError
from xformopt.lowering import load
from xformopt.lowering.artifact import Artifact
from xformopt.lowering.manifest import hash_file
from xformopt.program import Program


def arrays_of(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in batch.items()}


def gap(want: torch.Tensor, have: np.ndarray) -> float:
    return float(np.linalg.norm(have - want.numpy()) / np.linalg.norm(want.numpy()))


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def accept_changes(folder: Path, name: str) -> None:
    """Record a changed file's hash anew, as someone would who means to deceive."""
    files = json.loads((folder / "artifact.json").read_text())["files"]
    edit_manifest(folder, files={**files, name: hash_file(folder / name).model_dump()})


def test_it_runs_before_it_is_saved(artifact: Artifact, encoder: Program, batch: dict[str, torch.Tensor]) -> None:
    assert artifact.input_names == ("ids", "mask")
    assert artifact.output_names == ("hidden", "pooled")
    expected, found = encoder.run(batch), artifact.run(**arrays_of(batch))
    assert list(found) == ["hidden", "pooled"]
    assert gap(expected["pooled"], found["pooled"]) < 1e-6


def test_it_runs_after_a_round_trip(saved: Path, encoder: Program, batch: dict[str, torch.Tensor]) -> None:
    loaded = load(saved)
    expected, found = encoder.run(batch), loaded.run(**arrays_of(batch))
    for name in loaded.output_names:
        assert gap(expected[name], found[name]) < 1e-6
    assert loaded.manifest.history == ({"name": "nothing"},)
    assert loaded.manifest.source == "tests"
    assert loaded.manifest.fingerprint == encoder.fingerprint
    assert loaded.original().fingerprint == encoder.fingerprint


def test_a_plain_session_runs_the_file(saved: Path, encoder: Program, batch: dict[str, torch.Tensor]) -> None:
    session = onnxruntime.InferenceSession(str(saved / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_inputs()] == [["batch", "length"]] * 2
    found = session.run(["pooled"], arrays_of(batch))[0]
    assert gap(encoder.run(batch)["pooled"], found) < 1e-6


def test_nodes_are_named_by_their_module(saved: Path) -> None:
    names = {node.name for node in onnx.load(saved / "model.onnx").graph.node}
    assert "layer.0.attention/Attention" in names
    assert "layer.0.down/MatMul" in names


def test_residual_sums_stay_apart_from_norms(saved: Path) -> None:
    kinds = {node.name: node.op_type for node in onnx.load(saved / "model.onnx").graph.node}
    assert kinds["layer.0/Sum"] == "Sum"


def test_reference_outputs_are_those_of_the_eager_program(saved: Path, encoder: Program) -> None:
    inputs, outputs = (
        load_file(saved / "reference_inputs.safetensors"),
        load_file(saved / "reference_outputs.safetensors"),
    )
    assert torch.equal(encoder.run(inputs)["pooled"], outputs["pooled"])
    found = load(saved).run(**arrays_of(inputs))
    assert gap(outputs["hidden"], found["hidden"]) < 1e-6


def test_the_program_and_documents_are_optional(artifact: Artifact, tmp_path: Path) -> None:
    saved = artifact.save(tmp_path / "bare", program=False, documents={"bench.json": "{}"})
    assert not (tmp_path / "bare" / "program").exists()
    assert "bench.json" in saved.manifest.files
    loaded = load(tmp_path / "bare")
    with pytest.raises(ArtifactError, match="no Program of the original"):
        loaded.original()


def test_a_loaded_artifact_can_be_saved_again(saved: Path, tmp_path: Path, batch: dict[str, torch.Tensor]) -> None:
    load(saved).save(tmp_path / "again")
    assert load(tmp_path / "again").original().name == "encoder"


def test_an_existing_output_is_kept(artifact: Artifact, saved: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        artifact.save(saved)
    artifact.save(saved, overwrite=True)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["encoder"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"ids": x["ids"]}, "'mask' is missing"),
        (lambda x: {**x, "extra": x["ids"]}, "no input 'extra'"),
        (lambda x: {**x, "ids": x["ids"].astype(np.int32)}, r"must be int64\[batch, length\], but is int32"),
        (lambda x: {**x, "ids": x["ids"][0]}, r"but is int64\[7\]"),
        (lambda x: {**x, "ids": x["ids"][:, :6]}, "is 7 instead of 6"),
        (lambda x: {name: np.ones((1, 65), np.int64) for name in x}, r"length in \[1, 64\], but axis 1 is 65"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    artifact: Artifact, batch: dict[str, torch.Tensor], change: object, reason: str
) -> None:
    assert callable(change)
    with pytest.raises(DataError, match=reason):
        artifact.run(**change(arrays_of(batch)))


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not an artifact"):
        load(tmp_path)


def test_a_cut_manifest_is_refused(saved: Path) -> None:
    path = saved / "artifact.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(ArtifactError, match="cut short or edited"):
        load(saved)


def test_another_version_is_refused(saved: Path) -> None:
    edit_manifest(saved, format="xformopt/artifact/99", wings=2)
    with pytest.raises(ArtifactError, match=r"'xformopt/artifact/99', and this version .* 'xformopt/artifact/1'"):
        load(saved)


def test_a_damaged_field_is_named(saved: Path) -> None:
    edit_manifest(saved, dims="many")
    with pytest.raises(ArtifactError, match="damaged at dims"):
        load(saved)


def test_an_unknown_target_is_refused(saved: Path) -> None:
    edit_manifest(saved, target="abacus")
    with pytest.raises(ArtifactError, match="'abacus'"):
        load(saved)


@pytest.mark.parametrize("name", ["model.onnx", "program.txt", "program/weights.safetensors"])
def test_a_changed_file_is_named(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 0x01
    (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} was changed"):
        load(saved)


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        load(saved)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname"])
def test_a_manifest_cannot_name_files_outside(saved: Path, name: str) -> None:
    (saved.parent / "outside.txt").write_text("outside")
    files = json.loads((saved / "artifact.json").read_text())["files"]
    edit_manifest(saved, files={**files, name: {"sha256": "0" * 64, "bytes": 7}})
    with pytest.raises(ArtifactError, match="not a file of its folder"):
        load(saved)


def test_a_model_that_is_not_listed_is_refused(saved: Path) -> None:
    edit_manifest(saved, model="other.onnx")
    with pytest.raises(ArtifactError, match="does not list it"):
        load(saved)


def test_a_model_that_is_no_onnx_is_refused(saved: Path) -> None:
    (saved / "model.onnx").write_bytes(b"\x00not a model")
    accept_changes(saved, "model.onnx")
    with pytest.raises(ArtifactError, match="cannot be read as an ONNX model"):
        load(saved)


def with_external_data(folder: Path, location: str, length: int = 24 * 24 * 4) -> None:
    model = onnx.load(folder / "model.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "q.w.transposed")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    accept_changes(folder, "model.onnx")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "deep/../../weights.bin"])
def test_weights_outside_of_the_folder_are_refused(saved: Path, location: str) -> None:
    (saved.parent / "weights.bin").write_bytes(bytes(24 * 24 * 4))
    with_external_data(saved, location)
    with pytest.raises(ArtifactError, match="outside of the model's folder"):
        load(saved)


def test_weights_behind_a_link_are_refused(saved: Path) -> None:
    (saved.parent / "weights.bin").write_bytes(bytes(24 * 24 * 4))
    os.symlink(saved.parent / "weights.bin", saved / "weights.bin")
    with_external_data(saved, "weights.bin")
    with pytest.raises(ArtifactError, match="behind a link"):
        load(saved)


def test_weights_behind_a_linked_folder_are_refused(saved: Path) -> None:
    (saved.parent / "other").mkdir()
    (saved.parent / "other" / "weights.bin").write_bytes(bytes(24 * 24 * 4))
    os.symlink(saved.parent / "other", saved / "deep")
    with_external_data(saved, "deep/weights.bin")
    with pytest.raises(ArtifactError, match="behind a link"):
        load(saved)


def test_missing_and_short_weights_are_named(saved: Path) -> None:
    with_external_data(saved, "weights.bin")
    with pytest.raises(ArtifactError, match=r"weights\.bin, which is missing"):
        load(saved)
    (saved / "weights.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="cut short"):
        load(saved)


def test_inputs_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    from xformopt.lowering import lower, open_runner

    program = Program.parse("""program "m" lifted
dim batch in [1, inf]
dim few in [1, 3]
input %x: f32[batch,3]
input %ranks: i64[few] below 3 default ascending
input %past: f32[batch,3] default zeros
%some: f32[batch,few] = aten.index_select(%x, %ranks) {dim=1}
%sum: f32[batch,3] = aten.add.Tensor(%x, %past)
return some=%some, present=%sum
""")
    lower(program, measure=False).save(tmp_path / "artifact")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    opened, runner = load(tmp_path / "artifact"), open_runner("ort-cpu", tmp_path / "artifact", threads=1)
    for found in (opened.run(x=x), runner.run({"x": x})):
        np.testing.assert_array_equal(found["some"], x)
        np.testing.assert_array_equal(found["present"], x)
    given = opened.run(x=x, ranks=[2], past=x)
    np.testing.assert_array_equal(given["some"], x[:, 2:])
    np.testing.assert_array_equal(given["present"], 2 * x)
    with pytest.raises(DataError, match="'x' is missing"):
        opened.run(past=x)
