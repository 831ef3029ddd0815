"""Checks of a Hugging Face directory before anything in it is loaded: its config and its weight files.

Each check that fails raises a `CaptureError` of one paragraph. Nothing here runs code from the directory.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformopt.errors import CaptureError

__all__ = ["Weights", "check_weights", "companion_files", "find_weights", "read_config", "read_json"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
)
CONVERT = "Convert them to safetensors with a machine you trust: model.save_pretrained(folder) writes that format."


@dataclass(frozen=True)
class Weights:
    """The weight files that transformers will read, in order; `pickled` for the older .bin format."""

    files: tuple[Path, ...]
    pickled: bool


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a Hugging Face directory, having checked that `folder` is one."""
    if not folder.exists():
        raise CaptureError(f'There is no "{folder}": expected a Hugging Face model directory.')
    if not folder.is_dir():
        raise CaptureError(
            f'"{folder}" is a file, but a Hugging Face model is a directory that holds config.json and '
            "weights. Give the directory instead."
        )
    if not any(folder.iterdir()):
        raise CaptureError(
            f'The directory "{folder}" is empty: expected a Hugging Face model, that is config.json and '
            "model.safetensors."
        )
    if not (folder / "config.json").is_file():
        raise CaptureError(
            f'The directory "{folder}" has no config.json, so it is not a Hugging Face model directory. '
            "Write one with model.save_pretrained(folder), or give the subdirectory that holds config.json."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CaptureError(
            f'"{folder / "config.json"}" holds a JSON {type(config).__name__}, not an object of settings: '
            "it is not the config of a Hugging Face model."
        )
    return config


def read_json(path: Path) -> Any:
    """Parse a JSON file, or say where it stops being JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CaptureError(
            f'"{path}" is not JSON: byte {error.start} is not UTF-8 text. The file is damaged or misnamed; '
            "fetch the model again."
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise CaptureError(
            f'"{path}" is not valid JSON ({place}). The file is damaged; fetch the model again.'
        ) from error
    except OSError as error:
        raise CaptureError(f'"{path}" cannot be read: {error.strerror}.') from error


def find_weights(folder: Path) -> Weights:
    """Return the weight files that transformers will read from `folder`, all inside it and all present."""
    name = next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if name is None:
        raise CaptureError(
            f'The directory "{folder}" has a config.json but no weights: expected model.safetensors, or '
            "model.safetensors.index.json with its shards. Fetch the weights, or write them with "
            "model.save_pretrained(folder)."
        )
    main = _confined(folder, name)
    files = tuple(_shards(folder, main)) if name.endswith(".index.json") else (main,)
    return Weights(files, pickled=".bin" in name)


def check_weights(weights: Weights) -> None:
    """Read every weight file's table of contents and refuse damaged or unsafe ones."""
    for file in weights.files:
        if weights.pickled:
            _check_pickle(file)
        else:
            _check_safetensors(file)


def companion_files(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer, processor and config files of `folder`, sorted by name."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return tuple(sorted(found))


def _shards(folder: Path, index: Path) -> Iterator[Path]:
    table = read_json(index)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CaptureError(
            f'"{index}" has no "weight_map" from tensor names to file names, so it is not an index of '
            "weights. Fetch the model again."
        )
    for name in sorted(set(names.values())):
        yield _confined(folder, name, index)


def _confined(folder: Path, name: str, index: Path | None = None) -> Path:
    """Return ``folder / name`` after making sure that it is a file and stays inside the folder."""
    origin = f'"{index}" names the shard "{name}"' if index else f'The weight file "{folder / name}"'
    if Path(name).name != name or name in ("", ".", ".."):
        raise CaptureError(
            f"{origin}, which lies outside the model's directory. Shards must be plain file names beside the "
            "index; refusing to read it."
        )
    path = folder / name
    target = path.resolve()
    if not _inside(target, folder):
        raise CaptureError(
            f'{origin} is a link to "{target}", outside the model\'s directory; refusing to follow it. '
            "Copy the file into the directory if you trust it."
        )
    if not path.is_file():
        raise CaptureError(
            f"{origin}, but it is missing. Fetch it, or write the model again with save_pretrained."
            if index
            else f"{origin} is not a readable file: expected the model's weights."
        )
    return path


def _inside(target: Path, folder: Path) -> bool:
    """Tell whether a resolved path is in the folder, or in the blobs of the download cache around it."""
    home = folder.resolve()
    if target.is_relative_to(home):
        return True
    # the layout of huggingface_hub: models--name/snapshots/<revision>/ links to models--name/blobs/<hash>
    return home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            empty = not opened.keys()
    except (SafetensorError, OSError) as error:
        raise CaptureError(f'"{file}" {_what_is_wrong(file)} ({error}). Fetch the file again.') from error
    if empty:
        raise CaptureError(f'"{file}" holds no tensors: expected the weights of the model.')


def _what_is_wrong(file: Path) -> str:
    """Say in words why a file is not safetensors, from its first bytes and its size."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = int.from_bytes(head, "little")
        if size < 8:
            return f"is only {size} bytes long, too short to be a safetensors file"
        if head.startswith(b"version "):
            return "is a Git LFS pointer, not the weights themselves"
        if length > size - 8:
            return f"is truncated or not safetensors: its header should take {length} of its {size} bytes"
        header = opened.read(length)
    ends = _data_ends(header)
    if ends and max(ends) > size - 8 - length:
        missing = max(ends) - (size - 8 - length)
        return f"is truncated: its header promises {max(ends)} bytes of tensors, {missing} more than there are"
    return "has a safetensors header that contradicts the file"


def _data_ends(header: bytes) -> list[int]:
    try:
        table = json.loads(header)
        return [int(entry["data_offsets"][1]) for name, entry in table.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return []


def _check_pickle(file: Path) -> None:
    import torch

    try:
        # on the meta device no tensor data is read, so this costs little even for large files
        torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CaptureError(
            f'The weights "{file}" are pickled and hold more than tensors, so loading them could run code; '
            f"refusing. {CONVERT}"
        ) from error
    except Exception as error:
        raise CaptureError(
            f'The weights "{file}" are damaged or not a PyTorch checkpoint ({type(error).__name__}). '
            "Fetch the file again, or use weights in safetensors."
        ) from error
