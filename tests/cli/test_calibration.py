"""Calibration data of every form becomes batches that fit, or one paragraph why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from xformopt.calibration import load_calibration
from xformopt.errors import DataError
from xformopt.program import Program

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat"]
TEXT = """program "encoder" captured
dim batch in [1, inf]
dim length in [1, 6]
input %input_ids: i64[batch,length] below 10
input %attention_mask: i64[batch,length]
param %table: f32[10,4]
%embedding: f32[batch,length,4] = aten.embedding(%table, %input_ids)
return hidden=%embedding valid keep %attention_mask
"""
IMAGES = """program "vision" captured
dim batch in [1, inf]
input %pixels: f32[batch,3,2]
%out: f32[batch,3,2] = aten.relu(%pixels)
return out=%out
"""
FIXED = IMAGES.replace("dim batch in [1, inf]\n", "").replace("batch", "2")


@pytest.fixture
def text() -> Program:
    return Program.parse(TEXT)


@pytest.fixture
def images() -> Program:
    return Program.parse(IMAGES)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    built = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    (tmp_path / "model").mkdir()
    built.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model" / "tokenizer.json"


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def tokens(rows: int = 5, length: int = 4, **changes: np.ndarray) -> dict[str, np.ndarray]:
    ids = np.arange(rows * length).reshape(rows, length) % 10
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **changes}


def test_rows_are_cut_into_batches(text: Program, tmp_path: Path) -> None:
    data = tokens()
    batches = load_calibration(npz(tmp_path, **data), text, batch=2)
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2, 1]
    joined = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(joined, torch.from_numpy(data["input_ids"]))


def test_limit_counts_rows(text: Program, tmp_path: Path) -> None:
    batches = load_calibration(npz(tmp_path, **tokens()), text, batch=2, limit=3)
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 1]


def test_a_leading_sample_axis_is_one_batch_each(text: Program, tmp_path: Path) -> None:
    data = {name: value.reshape(3, 2, 4) for name, value in tokens(6).items()}
    batches = load_calibration(npz(tmp_path, **data), text, limit=2)
    assert len(batches) == 2
    assert torch.equal(batches[1]["input_ids"], torch.from_numpy(data["input_ids"][1]))


def test_a_fixed_batch_is_met_and_the_rest_left(tmp_path: Path) -> None:
    batches = load_calibration(npz(tmp_path, pixels=np.ones((5, 3, 2), np.float32)), Program.parse(FIXED), batch=4)
    assert [batch["pixels"].shape[0] for batch in batches] == [2, 2]


def test_what_does_not_vary_with_the_rows_is_kept_whole(tmp_path: Path) -> None:
    program = Program.parse(IMAGES.replace("%out: ", "input %bias: f32[2]\n%out: "))
    path = npz(tmp_path, pixels=np.ones((3, 3, 2), np.float32), bias=np.ones(2, np.float32))
    batches = load_calibration(path, program, batch=2)
    assert [tuple(batch["bias"].shape) for batch in batches] == [(2,), (2,)]


def test_exact_conversions(text: Program, images: Program, tmp_path: Path) -> None:
    narrow = {name: value.astype(np.int32) for name, value in tokens().items()}
    assert load_calibration(npz(tmp_path, **narrow), text)[0]["input_ids"].dtype == torch.int64
    assert load_calibration(npz(tmp_path, pixels=np.ones((1, 3, 2))), images)[0]["pixels"].dtype == torch.float32


def test_safetensors(images: Program, tmp_path: Path) -> None:
    save_file({"pixels": torch.arange(12.0).reshape(2, 3, 2)}, tmp_path / "data.safetensors")
    (batch,) = load_calibration(tmp_path / "data.safetensors", images)
    assert torch.equal(batch["pixels"], torch.arange(12.0).reshape(2, 3, 2))


def test_text_is_padded_per_batch_and_cut_at_the_bound(text: Program, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat\n\n  a mat sat\nthe cat sat on a mat on the mat\n")
    first, second = load_calibration(tmp_path / "lines.txt", text, tokenizer_files=[tokenizer], batch=2)
    assert first["input_ids"].tolist() == [[2, 4, 5, 3, 0], [2, 8, 9, 6, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert second["input_ids"].tolist() == [[2, 4, 5, 6, 7, 3]]


def refuse(path: Path, program: Program, *fragments: str, **options: object) -> None:
    with pytest.raises(DataError) as caught:
        load_calibration(path, program, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_missing(text: Program, tmp_path: Path) -> None:
    refuse(tmp_path / "absent.npz", text, "does not exist", "absent.npz")
    refuse(tmp_path, text, "is not a file")


@pytest.mark.parametrize("name", ["data.npz", "data.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x00" * 64])
def test_damaged(name: str, content: bytes, text: Program, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, text, "cannot be read")


def test_no_arrays(text: Program, tmp_path: Path) -> None:
    refuse(npz(tmp_path), text, "holds no arrays")


def test_pickled_arrays_are_not_read(text: Program, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))

    path = npz(tmp_path, **tokens(input_ids=np.array([Payload()], dtype=object)))
    with (
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as opened,
        pytest.raises(ValueError, match="pickle"),
    ):
        opened["input_ids"]
    refuse(path, text, "cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"extra": np.ones(3)}, ["array 'extra'", "input_ids: i64[batch, length]"]),
        ({"input_ids": np.ones((5, 4), np.float32)}, ["input_ids must be i64[batch, length], but is f32[5, 4]"]),
        ({"input_ids": np.ones(5, np.int64)}, ["input_ids must be i64[batch, length], but is i64[5]", "2 axes"]),
        ({"input_ids": np.ones((0, 4), np.int64)}, ["is empty"]),
        ({"input_ids": np.full((5, 4), 10)}, ["holds 10", "outside of [0, 9]", "tokenizer"]),
        ({"input_ids": np.full((5, 4), -1)}, ["holds -1"]),
        ({"input_ids": np.ones((3, 4), np.int64)}, ["number of samples", "attention_mask 5", "input_ids 3"]),
        ({"input_ids": np.ones((5, 3), np.int64)}, ["batch 0", "attention_mask", "is 4 instead of 3"]),
        ({"attention_mask": np.ones((2, 5, 4), np.int64)}, ["leading sample axis"]),
        ({"attention_mask": np.ones((5, 4), complex)}, ["attention_mask must be"]),
    ],
)
def test_arrays_that_do_not_fit(
    changes: dict[str, np.ndarray], fragments: list[str], text: Program, tmp_path: Path
) -> None:
    refuse(npz(tmp_path, **tokens(**changes)), text, *fragments)


def test_a_missing_array(text: Program, tmp_path: Path) -> None:
    path = npz(tmp_path, ids=np.ones((2, 4), np.int64), attention_mask=np.ones((2, 4), np.int64))
    refuse(path, text, "no array 'input_ids'", "found attention_mask, ids")


def test_too_long(text: Program, tmp_path: Path) -> None:
    refuse(npz(tmp_path, **tokens(length=7)), text, "length in [1, 6]", "is 7")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float, images: Program, tmp_path: Path) -> None:
    data = np.ones((2, 3, 2), np.float32)
    data[1, 0, 0] = value
    refuse(npz(tmp_path, pixels=data), images, "1 values that are NaN or infinite")


def test_wrong_fixed_axis(images: Program, tmp_path: Path) -> None:
    refuse(npz(tmp_path, pixels=np.ones((4, 5, 2), np.float32)), images, "axis 1 is 5 instead of 3")


def test_fewer_rows_than_a_fixed_batch(tmp_path: Path) -> None:
    refuse(npz(tmp_path, pixels=np.ones((1, 3, 2), np.float32)), Program.parse(FIXED), "takes 2 at a time")


def test_empty_text(text: Program, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n  \n")
    refuse(tmp_path / "lines.txt", text, "is empty", tokenizer_files=[tokenizer])


def test_text_without_a_tokenizer(text: Program, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat\n")
    refuse(tmp_path / "lines.txt", text, "without a tokenizer.json")


def test_text_that_is_binary(text: Program, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfe\x00\x01")
    refuse(tmp_path / "lines.txt", text, "not UTF-8", tokenizer_files=[tokenizer])


def test_damaged_tokenizer(text: Program, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat\n")
    tokenizer.write_text("{}")
    refuse(tmp_path / "lines.txt", text, "tokenizer.json cannot be read", tokenizer_files=[tokenizer])


def test_text_for_images(images: Program, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat\n")
    refuse(tmp_path / "lines.txt", images, "cannot fill the input pixels", tokenizer_files=[tokenizer])


def test_token_ids_beyond_the_vocabulary(text: Program, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the mat\n")
    small = Program.parse(TEXT.replace("below 10", "below 9").replace("f32[10,4]", "f32[9,4]"))
    refuse(tmp_path / "lines.txt", small, "holds 9", "[0, 8]", "another tokenizer", tokenizer_files=[tokenizer])
