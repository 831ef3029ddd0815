"""Calibration data: files of arrays or of text, as batches of named tensors that fit a Program.

Arrays (``.npz``, ``.safetensors``) are stored by input name.  Arrays of the inputs' own rank hold rows, which are cut
into batches along the first axis.  Arrays with one axis more hold whole inputs: each entry along that leading sample
axis is a batch.  Text is one input per line, read with the model's own ``tokenizer.json``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xformopt.errors import DataError, MissingExtraError
from xformopt.program import Input, Program
from xformopt.program.text import DTYPE_NAMES

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["load_calibration"]

_FORMS = "an .npz or .safetensors file with one array per input, or a text file with one input per line"
# how the fields of an encoding are called among the inputs of a model
_ENCODED = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_TOKENIZER = "tokenizer.json"


def load_calibration(
    path: str | Path,
    program: Program,
    *,
    tokenizer_files: Iterable[str | Path] = (),
    limit: int = 256,
    batch: int = 8,
) -> list[dict[str, torch.Tensor]]:
    """Read calibration data.

    Args:
        path: An ``.npz``, ``.safetensors`` or text file.
        program: Whose inputs the data is for.
        tokenizer_files: Files of the model's source, with a ``tokenizer.json`` among them; needed for text.
        limit: Samples (rows or lines) to use at most, the first ones.
        batch: Rows of a batch; a program whose batch is fixed takes as many as it is made for.

    Returns:
        Batches of tensors by input name, in the dtypes of the inputs.

    Raises:
        DataError: the file is missing, empty or damaged, or what it holds does not fit the program's inputs.
        MissingExtraError: text is given and the package ``tokenizers`` is not installed.

    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"The calibration data {path} {what}. Name {_FORMS}.")
    if path.suffix in (".npz", ".safetensors"):
        batches = _cut(_read_arrays(path), program, path, limit, batch)
    else:
        batches = _read_text(path, program, tokenizer_files, limit, batch)
    for index, values in enumerate(batches):
        _check_sizes(program, values, f"batch {index} of {path}")
    return batches


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"The calibration data {path} cannot be read: {reason}. Write it again as {_FORMS}.") from error
    if not arrays:
        raise DataError(f"The calibration data {path} holds no arrays. Name {_FORMS}.")
    return arrays


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz archive, or was cut short")
    # pickled arrays run code when they are read
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    arrays: dict[str, torch.Tensor] = load_file(path)
    return arrays


def _cut(
    arrays: Mapping[str, torch.Tensor], program: Program, path: Path, limit: int, rows: int
) -> list[dict[str, torch.Tensor]]:
    """Check every array against its input, and cut them all into batches."""
    expected = ", ".join(f"{spec.name}: {_type_of(spec)}" for spec in program.inputs)
    if missing := [name for name in program.input_names if name not in arrays]:
        raise DataError(
            f"The calibration data {path} has no array {missing[0]!r}: expected {expected}; "
            f"found {', '.join(sorted(arrays))}."
        )
    if unknown := sorted(set(arrays) - set(program.input_names)):
        raise DataError(f"The calibration data {path} has an array {unknown[0]!r}, but the inputs are {expected}.")
    values = {spec.name: _fit(arrays[spec.name], spec, path) for spec in program.inputs}
    stacked = {spec.name for spec in program.inputs if values[spec.name].dim() > len(spec.shape)}
    if stacked and len(stacked) < len(values):
        raise DataError(
            f"In the calibration data {path}, {min(stacked)} has a leading sample axis and "
            f"{min(set(values) - stacked)} has none. Give all of them one, or none."
        )
    # what does not vary with the rows (a table of positions) belongs to every batch
    first = program.inputs[0].shape[:1]
    cut = stacked or {spec.name for spec in program.inputs if spec.shape[:1] == first and first}
    if not cut:
        return [values]
    count = _count({name: values[name] for name in sorted(cut)}, path)
    spans = (
        [(i, i + 1) for i in range(min(count, limit))] if stacked else _spans(first[0], min(count, limit), rows, path)
    )
    return [
        {name: (value[i] if stacked else value[i:end]) if name in cut else value for name, value in values.items()}
        for i, end in spans
    ]


def _count(values: Mapping[str, torch.Tensor], path: Path) -> int:
    counts = {name: value.shape[0] for name, value in values.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"The arrays of the calibration data {path} differ in their number of samples: {listed}.")
    return next(iter(counts.values()))


def _spans(first: int | str, count: int, rows: int, path: Path) -> list[tuple[int, int]]:
    """Return where batches start and end; a fixed first axis decides their size, and rows left over are not used."""
    if isinstance(first, str):
        return [(start, min(start + rows, count)) for start in range(0, count, rows)]
    if count < first:
        raise DataError(
            f"The calibration data {path} has {count} samples, but the program takes {first} at a time. "
            f"Add samples, or capture the model with a dynamic batch."
        )
    return [(start, start + first) for start in range(0, count - first + 1, first)]


def _fit(value: torch.Tensor, spec: Input, path: Path) -> torch.Tensor:
    """Check rank, kind and values of one array, and return it in the input's dtype."""
    found = f"{DTYPE_NAMES.get(value.dtype, value.dtype)}{list(value.shape)}"
    wrong = f"In the calibration data {path}, the input {spec.name} must be {_type_of(spec)}, but is {found}"
    if value.dim() not in (len(spec.shape), len(spec.shape) + 1):
        raise DataError(f"{wrong}: expected {len(spec.shape)} axes, or one more for samples.")
    if not value.numel():
        raise DataError(f"{wrong}: it is empty. Give at least one sample.")
    if _kind(value.dtype) != _kind(spec.dtype):
        raise DataError(f"{wrong}: expected the type {DTYPE_NAMES[spec.dtype]}, or one that converts to it exactly.")
    for axis, (size, have) in enumerate(zip(reversed(spec.shape), reversed(value.shape), strict=False), 1):
        # the first axis of rows is cut later to the size that the program takes
        is_rows = axis == len(spec.shape) == value.dim()
        if isinstance(size, int) and size != have and not is_rows:
            raise DataError(f"{wrong}: axis {value.dim() - axis} is {have} instead of {size}.")
    if value.is_floating_point():
        if not bool(value.isfinite().all()):
            raise DataError(f"{wrong} with {int((~value.isfinite()).sum())} values that are NaN or infinite.")
    elif spec.dtype != torch.bool:
        _check_bound(value, spec, path)
    return value.to(spec.dtype)


def _check_bound(value: torch.Tensor, spec: Input, path: Path) -> None:
    low, high = int(value.min()), int(value.max())
    limits = torch.iinfo(spec.dtype)
    end = spec.bound if spec.bound is not None else limits.max + 1
    start = 0 if spec.bound is not None else limits.min
    if low < start or high >= end:
        hint = "Was it made with another tokenizer?" if spec.bound is not None else "Give values that its type holds."
        raise DataError(
            f"In the calibration data {path}, the input {spec.name} holds {low if low < start else high}, "
            f"which is outside of [{start}, {end - 1}], the range that the model takes. {hint}"
        )


def _read_text(
    path: Path, program: Program, tokenizer_files: Iterable[str | Path], limit: int, rows: int
) -> list[dict[str, torch.Tensor]]:
    if unknown := [spec.name for spec in program.inputs if spec.name not in _ENCODED or len(spec.shape) != 2]:
        raise DataError(
            f"The calibration data {path} is text, which cannot fill the input {unknown[0]}; a tokenizer gives "
            f"{', '.join(_ENCODED)}. Name an .npz or .safetensors file with one array per input."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"The calibration data {path} is not UTF-8 text ({error}). Name {_FORMS}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()][:limit]
    if not lines:
        raise DataError(f"The calibration data {path} is empty. Write one input per line.")
    tokenizer = _open_tokenizer(tokenizer_files, program, path)
    spans = _spans(program.inputs[0].shape[0], len(lines), rows, path)
    return [_encode(tokenizer, lines[start:end], program, path) for start, end in spans]


def _open_tokenizer(files: Iterable[str | Path], program: Program, path: Path) -> Tokenizer:
    found = next((Path(file) for file in files if Path(file).name == _TOKENIZER and Path(file).is_file()), None)
    if found is None:
        raise DataError(
            f"The calibration data {path} is text, but the model comes without a {_TOKENIZER} to read it with. "
            f"Put that file beside the model, or name an .npz or .safetensors file with one array per input."
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "hf", f"Reading the text {path}") from error
    try:
        tokenizer = Tokenizer.from_file(str(found))
    except Exception as error:
        raise DataError(f"The tokenizer {found} cannot be read: {error}. Restore the file.") from error
    _fit_tokenizer(tokenizer, program, found)
    return tokenizer


def _fit_tokenizer(tokenizer: Tokenizer, program: Program, file: Path) -> None:
    """Cut inputs at the length that the program takes at most, and pad those of a batch to one length."""
    length = program.inputs[0].shape[1]
    is_fixed = isinstance(length, int)
    longest = length if isinstance(length, int) else program.dims[length].high
    tokenizer.no_truncation()
    if longest is not None:
        tokenizer.enable_truncation(max_length=longest)
    padding = tokenizer.padding or {}
    token = str(padding.get("pad_token", _padding_token(tokenizer, file)))
    number = tokenizer.token_to_id(token)
    tokenizer.enable_padding(
        direction=str(padding.get("direction", "right")),
        pad_id=0 if number is None else number,
        pad_token=token,
        length=longest if is_fixed else None,
    )


def _padding_token(tokenizer: Tokenizer, file: Path) -> str:
    """Return what pads a batch: the token that the configuration beside the tokenizer names, or a usual one."""
    config = file.with_name("tokenizer_config.json")
    named: Any = None
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("pad_token")
        except (OSError, ValueError, AttributeError):
            named = None
    named = named.get("content") if isinstance(named, dict) else named
    usual = (named, "[PAD]", "<pad>", "<|endoftext|>", "</s>")
    return next((token for token in usual if isinstance(token, str) and tokenizer.token_to_id(token) is not None), "")


def _encode(tokenizer: Tokenizer, lines: list[str], program: Program, path: Path) -> dict[str, torch.Tensor]:
    encodings: list[Encoding] = tokenizer.encode_batch(lines)
    values = {}
    for spec in program.inputs:
        rows = [getattr(encoding, _ENCODED[spec.name]) for encoding in encodings]
        values[spec.name] = _fit(torch.tensor(rows, dtype=torch.int64), spec, path)
    return values


def _check_sizes(program: Program, values: Mapping[str, torch.Tensor], where: str) -> None:
    try:
        program.bind(values)
    except DataError as error:
        raise DataError(f"In the calibration data, {where} does not fit: {error}") from error


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "integer"


def _type_of(spec: Input) -> str:
    return f"{DTYPE_NAMES[spec.dtype]}[{', '.join(map(str, spec.shape))}]"
