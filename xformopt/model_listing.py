"""What a listing says of every zoo model: where it was published, how large it is, and what running it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from xformopt.capture.resolve import MINILM
from xformopt.errors import MissingExtraError
from xformopt.models.architecture import Architecture
from xformopt.models.trained import Trained
from xformopt.models.zoo import find_model, model_names

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
    return sorted((_describe_minilm(), *(_describe(find_model(name)) for name in model_names())), key=_by_name)


def _by_name(info: ModelInfo) -> str:
    return info.name


def _describe(found: Architecture | Trained) -> ModelInfo:
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

    about = (MINILM, "all-MiniLM-L6-v2, pretrained sentence embeddings; weights with the extra `demo`", _MINILM_SOURCES)
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
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    return int(counter.get_total_flops())
