from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xformopt.capture import huggingface
from xformopt.capture.huggingface import load_directory, minilm_directory
from xformopt.capture.source import check_finite
from xformopt.errors import CaptureError, MissingExtraError

Save = Callable[[str], Path]


@pytest.fixture
def folder(save_model: Save) -> Path:
    return save_model("bert")


def refuse(folder: Path, *fragments: str) -> str:
    """Load, and check that the refusal is one paragraph that holds the fragments."""
    with pytest.raises(CaptureError) as caught:
        load_directory(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "There is no", "absent")


def test_a_file(folder: Path) -> None:
    refuse(folder / "config.json", "is a file", "Give the directory")


def test_empty(tmp_path: Path) -> None:
    refuse(tmp_path, "is empty")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(folder, "has no config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'single': 1}", "line 1"),
        (b"[1, 2]", "not an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_config_is_not_json(content: bytes, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    refuse(folder, message, "config.json")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(folder, "no weights", "model.safetensors")


def test_pickled_weights_are_read_if_only_tensors(folder: Path) -> None:
    expected = load_directory(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    source = load_directory(folder)
    for name, tensor in expected.module.state_dict().items():
        assert torch.equal(tensor, source.module.state_dict()[name])


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("raw", [False, True])
def test_pickled_weights_that_run_code(raw: bool, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        (pickle.dump if raw else torch.save)({"weight": Payload(tmp_path / "pwned")}, file)
    refuse(folder, "could run code", "safetensors")
    assert not (tmp_path / "pwned").exists()


def test_damaged_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 nothing more")
    refuse(folder, "damaged or not a PyTorch checkpoint")


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0, "too short"), (5, "too short"), (100, "header should take"), (-8, "is truncated")],
)
def test_truncated_safetensors(keep: int, message: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(folder, message, "model.safetensors")


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuse(folder, "Git LFS pointer")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "NOPE", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_lying_safetensors_header(entry: dict[str, object], folder: Path) -> None:
    header = json.dumps({"weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refuse(folder, "model.safetensors")


def test_no_tensors(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    refuse(folder, "holds no tensors")


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("encoder.layer.0.output.dense.bias"))
    refuse(folder, '"encoder.layer.0.output.dense.bias"', "BertModel", "drawn at random")


def test_renamed_tensor(folder: Path) -> None:
    edit_weights(
        folder,
        lambda weights: weights.update({"encoder.layer.0.kernel": weights.pop("encoder.layer.0.output.dense.weight")}),
    )
    refuse(folder, '"encoder.layer.0.output.dense.weight"', '"encoder.layer.0.kernel"')


def test_pooler_the_checkpoint_never_had(folder: Path) -> None:
    edit_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("pooler")])
    refuse(folder, '"pooler.dense.bias"', "1 more")


def test_unused_tensors_are_noted(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"cls.bias": torch.zeros(3)}))
    assert any('"cls.bias"' in note for note in load_directory(folder).notes)


def test_tied_weights_are_not_missing(save_model: Save) -> None:
    folder = save_model("qwen3")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_directory(folder)


def test_shape_mismatch(folder: Path) -> None:
    edit_config(folder, intermediate_size=52)
    refuse(folder, "intermediate.dense", "48", "52", "more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_parameters_that_are_not_finite(value: float, folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["encoder.layer.1.output.dense.bias"][3] = value

    edit_weights(folder, spoil)
    refuse(folder, '"encoder.layer.1.output.dense.bias"', "1 of 32", "NaN or infinite")


def test_infinite_buffers_are_legal_and_nan_buffers_not() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")))
    module.register_buffer("ids", torch.arange(3))
    check_finite(module, "the test")
    module.register_buffer("broken", torch.tensor([float("nan")]))
    with pytest.raises(CaptureError, match='buffer "broken"'):
        check_finite(module, "the test")


def write_index(folder: Path, shard: str) -> None:
    weights = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def test_sharded_weights(folder: Path) -> None:
    write_index(folder, "model-00001-of-00001.safetensors")
    load_directory(folder)


def test_missing_shard(folder: Path) -> None:
    write_index(folder, "model-00002-of-00002.safetensors")
    refuse(folder, '"model-00002-of-00002.safetensors"', "missing")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..", "", "sub/shard.safetensors"])
def test_shard_outside_the_directory(shard: str, folder: Path) -> None:
    write_index(folder, shard)
    shutil.copy(folder / "model-00001-of-00001.safetensors", folder.parent / "outside.safetensors")
    refuse(folder, "outside the model's directory")


def test_index_without_a_map(folder: Path) -> None:
    write_index(folder, "x")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}')
    refuse(folder, "weight_map")


def test_link_out_of_the_directory(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(folder, "is a link to", "refusing to follow")


def test_links_of_the_download_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a1b", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_directory(snapshot)


def test_remote_code_is_off(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, architectures=["Custom"], auto_map={"AutoModel": "modeling.Custom"})
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\n")
    refuse(folder, "modeling.Custom", "--trust-remote-code")
    assert not (tmp_path / "pwned").exists()


def test_remote_code_runs_if_trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    edit_config(folder, architectures=["Custom"], auto_map={"AutoModel": "modeling.Custom"})
    (folder / "modeling.py").write_text("from transformers import BertModel\nclass Custom(BertModel):\n    pass\n")
    source = load_directory(folder, trust_remote_code=True)
    assert type(source.module.model).__name__ == "Custom"
    assert any("trust_remote_code is on" in note for note in source.notes)


@pytest.mark.parametrize("name", ["BertModl", "BertConfig", "pipeline", "__name__"])
def test_unknown_architecture(name: str, folder: Path) -> None:
    edit_config(folder, architectures=[name])
    refuse(folder, f'"{name}"', "transformers")


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="nonesuch")
    refuse(folder, "config.json", "nonesuch")


def test_inconsistent_config(folder: Path) -> None:
    edit_config(folder, num_attention_heads=5)
    refuse(folder, "BertModel")


def test_quantized_checkpoint(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(folder, "already quantized (gptq)")


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"xformopt\[hf\]"):
        load_directory(folder)
    with pytest.raises(MissingExtraError, match=r"xformopt\[demo\]"):
        minilm_directory()
