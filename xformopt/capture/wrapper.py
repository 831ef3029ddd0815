"""Modules put around a loaded model so that tensors with stable names go in and come out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.nn import functional as F  # noqa: N812

__all__ = ["NamedModel", "SentenceEncoder", "named_forward"]

Module = TypeVar("Module", bound="NamedModel")
CACHES = ("past_key_values", "mems", "cache_params")


class NamedModel(torch.nn.Module):
    """A Hugging Face model as a function of named tensors: no cache, no nested outputs.

    `forward` takes exactly the tensors in `input_names`, by position or by name, and returns named tensors.
    """

    def __init__(self, model: torch.nn.Module, input_names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.input_names = input_names
        accepted = inspect.signature(model.forward).parameters
        wanted = {"use_cache": False, "return_dict": True}
        self.options = {name: value for name, value in wanted.items() if name in accepted}

    def compute(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model's output tensors, in the model's order."""
        return dict(_flatten(self.model(**inputs, **self.options)))


class SentenceEncoder(NamedModel):
    """A text encoder followed by the pooling that a sentence-transformers directory asks for."""

    def __init__(self, model: torch.nn.Module, input_names: tuple[str, ...], pooling: str, normalize: bool) -> None:
        super().__init__(model, input_names)
        self.pool = POOLINGS[pooling]
        self.normalize = normalize

    def compute(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the token states ``[B, T, C]`` and the sentence embedding ``[B, C]``."""
        states = super().compute(inputs)["last_hidden_state"]
        embedding = self.pool(states, inputs["attention_mask"])
        if self.normalize:
            embedding = F.normalize(embedding, p=2.0, dim=-1)
        return {"last_hidden_state": states, "sentence_embedding": embedding}


def named_forward(kind: type[Module], names: tuple[str, ...]) -> type[Module]:
    """Return a subclass of `kind` whose forward has exactly the parameters in `names`.

    A signature, not generated source: whatever asks for the forward's parameters (torch.export does) is told
    the names, and the call itself binds them.
    """
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    signature = inspect.Signature(parameters)

    def forward(self: Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
        bound = signature.bind(self, *args, **kwargs).arguments
        return self.compute({name: bound[name] for name in names})

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def mean_pooling(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average the states ``[B, T, C]`` over the valid tokens of ``mask`` ``[B, T]``."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def mean_sqrt_pooling(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum the states over the valid tokens and divide by the square root of their number."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()


def max_pooling(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Take the maximum of the states over the valid tokens."""
    return states.masked_fill(mask.unsqueeze(-1) == 0, -1e9).amax(1)


def cls_pooling(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Take the first token's state."""
    return states[:, 0]


Pooling = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
POOLINGS: Mapping[str, Pooling] = {
    "cls": cls_pooling,
    "max": max_pooling,
    "mean": mean_pooling,
    "mean_sqrt_len_tokens": mean_sqrt_pooling,
}


def _flatten(outputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model's output by name; tuples of tensors get a numbered name each."""
    if isinstance(outputs, torch.Tensor):
        outputs = {"output": outputs}
    if not isinstance(outputs, Mapping):
        outputs = {f"output_{index}": value for index, value in enumerate(outputs)}
    for name, value in outputs.items():
        if name in CACHES:
            continue
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            tensors = (tensor for tensor in value if isinstance(tensor, torch.Tensor))
            yield from ((f"{name}_{index}", tensor) for index, tensor in enumerate(tensors))
