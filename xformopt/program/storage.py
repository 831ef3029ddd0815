"""A Program on disk: its text beside its weights, memory-mapped when read, with nothing to unpickle.

program.txt               the text form
weights.safetensors       every parameter, stored once where several names share it
examples.safetensors      the example inputs, where there are any
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xformopt.errors import ArtifactError
from xformopt.files import staged_directory
from xformopt.program.program import Program

__all__ = ["load_program", "load_tensors", "save_program", "save_tensors"]

FORMAT = "xformopt/program/1"
_FACTS = "xformopt"
_TEXT, _WEIGHTS, _EXAMPLES = "program.txt", "weights.safetensors", "examples.safetensors"


def save_program(program: Program, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write ``program`` to ``folder``, which appears whole or not at all.

    Raises:
        OutputError: the folder exists, cannot be written, or the disk is full.

    """
    with staged_directory(folder, overwrite, marker=_TEXT) as staged:
        (staged / _TEXT).write_text(str(program), encoding="utf-8")
        save_tensors(program.parameters, staged / _WEIGHTS, {"format": FORMAT, "fingerprint": program.fingerprint})
        if program.example_inputs:
            save_tensors(program.example_inputs, staged / _EXAMPLES)


def load_program(folder: str | Path, *, verify: bool = True) -> Program:
    """Read what :func:`save_program` wrote; the weights are mapped into memory, not copied.

    Args:
        folder: Where the Program lies.
        verify: Whether to read all weights and compare their hash with the one they were saved with.

    Raises:
        ArtifactError: a file is missing, damaged, of another format, or not the one that was saved.
        ProgramError: the text does not parse, or names parameters that the weights do not hold.

    """
    folder = Path(folder)
    try:
        text = (folder / _TEXT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{folder} holds no readable {_TEXT} ({error}), so it is not a saved Program. "
            f"Name a folder that xformopt wrote, or save the Program again."
        ) from error
    weights, facts = load_tensors(folder / _WEIGHTS)
    if facts.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder / _WEIGHTS} has the format {facts.get('format', 'none')!r}, and this version of xformopt reads "
            f"{FORMAT!r}. Save the Program again with this version."
        )
    program = Program.parse(text, parameters=weights)
    if (folder / _EXAMPLES).exists():
        program.example_inputs = load_tensors(folder / _EXAMPLES)[0]
    if verify and program.fingerprint != facts.get("fingerprint"):
        raise ArtifactError(
            f"The Program in {folder} is not the one that was saved: {_TEXT} or {_WEIGHTS} was changed afterwards. "
            f"Save it again, or restore the file."
        )
    return program


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors; those that are one and the same are stored once."""
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    ranges: list[tuple[int, int]] = []
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and (known := first.setdefault(key, name)) != name:
            aliases[name] = known
            continue
        tensor = tensor.detach().contiguous()
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        # the format does not know tensors that overlap
        overlaps = any(low < end and start < high for low, high in ranges)
        ranges.append((start, end))
        stored[name] = tensor.clone() if overlaps else tensor
    # the library stores several entries in no fixed order, which would make equal files differ
    save_file(stored, path, {_FACTS: json.dumps({**(facts or {}), "aliases": aliases}, sort_keys=True)})
    # the library makes the file for its owner alone
    path.chmod(0o644)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Map the tensors of a safetensors file into memory; returns them and the facts stored with them.

    Raises:
        ArtifactError: the file is missing or damaged.

    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors.update({name: tensors[stored] for name, stored in facts.pop("aliases", {}).items()})
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path} cannot be read as safetensors ({error}): it is missing, cut short or damaged. "
            f"Restore the file, or write the folder again."
        ) from error
    return tensors, facts
