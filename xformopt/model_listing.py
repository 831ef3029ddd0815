"""What a listing says of every zoo model: where it was published, how large it is, and what running it costs.

Counting builds every model and runs it on shapes, which takes seconds; what was found is kept in the cache folder for
as long as the source of the models and the releases that count stay the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xformopt.errors import MissingExtraError, OutputError
from xformopt.files import cache_folder, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xformopt.models.architecture import Architecture
    from xformopt.models.trained import Trained

__all__ = ["ModelInfo", "list_models"]

_MINILM_SOURCES = (
    "Wang et al. 2020, MiniLM: Deep Self-Attention Distillation, arXiv 2002.10957",
    "Reimers & Gurevych 2019, Sentence-BERT, arXiv 1908.10084",
)


@dataclass(frozen=True)
class ModelInfo:
    """One model of the zoo.

    Attributes:
        name: What the command line calls it.
        summary: One line.
        sources: The publications that define it.
        task: What it was trained on; None for random weights.
        folds: How many checkpoints it has; 0 for random weights.
        inputs: Shape of each example input.
        parameters: How many there are, each counted once; None where an extra is missing.
        flops: Operations of matrix products, convolutions and attention on the example inputs, a multiply-add counted
            as two; None where an extra is missing.

    """

    name: str
    summary: str
    sources: tuple[str, ...]
    task: str | None
    folds: int
    inputs: dict[str, list[int]]
    parameters: int | None
    flops: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``models --json``."""
        return asdict(self)


def list_models() -> list[ModelInfo]:
    """Describe every model; nothing but shapes is computed, except for the one that comes with an extra."""
    kept = cache_folder() / "models" / f"{_digest()}.json"
    known = _read(kept)
    if known is not None:
        return known
    found = _described()
    if all(info.flops is not None for info in found):
        try:
            write_atomically(kept, json.dumps([info.to_dict() for info in found], indent=1))
        except (OSError, OutputError):
            # a cache that cannot be written only costs time
            return found
    return found


def _described() -> list[ModelInfo]:
    from xformopt.models.zoo import find_model, model_names

    found = (_describe_minilm(), *(_describe(find_model(name)) for name in model_names()))
    return sorted(found, key=lambda info: info.name)


def _digest() -> str:
    """Return a hash of all that a listing depends on: the source of the zoo, its checkpoints, and who counts."""
    import xformopt.models

    (folder,) = (Path(place) for place in xformopt.models.__path__)
    found = hashlib.blake2b(digest_size=16)
    for name in ("xformopt", "torch"):
        found.update(importlib.metadata.version(name).encode())
    for path in (Path(__file__), *sorted(folder.rglob("*.py"))):
        found.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(path.name.encode())
    return found.hexdigest()


def _read(path: Path) -> list[ModelInfo] | None:
    try:
        found = [ModelInfo(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        # a damaged answer is found again
        return None
    return [replace(info, sources=tuple(info.sources)) for info in found]


def _describe(found: Architecture | Trained) -> ModelInfo:
    import torch

    from xformopt.models.trained import Trained

    # on the meta device weights have shapes and no values
    with torch.device("meta"):
        module = found.module().eval().requires_grad_(False)
    inputs: dict[str, torch.Tensor] = module.example_inputs()  # type: ignore[operator]
    on_meta = {name: value.to("meta") for name, value in inputs.items()}
    with torch.device("meta"):
        flops = _count_flops(module, on_meta)
    return ModelInfo(
        name=found.name,
        summary=found.summary,
        sources=found.sources,
        task=found.task if isinstance(found, Trained) else None,
        folds=found.folds if isinstance(found, Trained) else 0,
        inputs={name: list(value.shape) for name, value in inputs.items()},
        parameters=_count_parameters(module),
        flops=flops,
    )


def _describe_minilm() -> ModelInfo:
    from xformopt.capture.huggingface import load_directory, minilm_directory
    from xformopt.capture.resolve import MINILM

    about = (
        MINILM,
        "all-MiniLM-L6-v2, pretrained sentence embeddings; weights with the extra `demo`",
        _MINILM_SOURCES,
    )
    try:
        source = load_directory(minilm_directory())
    except MissingExtraError:
        return ModelInfo(*about, task=None, folds=0, inputs={}, parameters=None, flops=None)
    return ModelInfo(
        *about,
        task=None,
        folds=0,
        inputs={name: list(value.shape) for name, value in source.example_inputs.items()},
        parameters=_count_parameters(source.module),
        flops=_count_flops(source.module, source.example_inputs),
    )


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_flops(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    return int(counter.get_total_flops())
