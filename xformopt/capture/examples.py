"""Example inputs for a Hugging Face model, derived from its forward's parameters and its config.

What a model takes is read from its signature and its config, not from a list of model names: token ids where
it has a vocabulary, pixels where it has an image size, spectrogram frames or samples where it hears.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.capture.source import Dim, Dynamic
from xformopt.errors import CaptureError, UsageError

__all__ = ["Examples", "derive_examples"]

DEFAULT_LENGTH = 128
DECODER_LENGTH = 16
AUDIO_SAMPLES = 16_000


@dataclass(frozen=True)
class Examples:
    """Example inputs in the forward's order, and the names of their dynamic axes."""

    inputs: dict[str, torch.Tensor]
    dynamic: Dynamic


@dataclass(frozen=True)
class _Request:
    model: Any
    batch: int
    length: int | None
    seed: torch.Generator


_Entry = tuple[str, torch.Tensor, dict[int, Dim]]


def derive_examples(model: Any, *, batch: int = 1, length: int | None = None) -> Examples:
    """Make example inputs for a transformers model.

    Args:
        model: A ``PreTrainedModel``.
        batch: Rows of every input.
        length: Tokens of text inputs; by default 128, or the most positions the model has if fewer.

    Raises:
        UsageError: The batch or length is not positive, or longer than the model's positions.
        CaptureError: Neither the forward nor the config says what the model takes.

    """
    if batch < 1 or (length is not None and length < 1):
        raise UsageError(f"The batch and the length must be at least 1; got batch {batch} and length {length}.")
    accepted = list(inspect.signature(model.forward).parameters)
    request = _Request(model, batch, length, torch.Generator().manual_seed(0))
    entries = {name: (tensor, axes) for name, tensor, axes in _entries(request, set(accepted))}
    if not entries:
        raise CaptureError(
            f"What {type(model).__name__} takes cannot be told from its config: its forward has the "
            f"parameters {', '.join(accepted)}. Write a factory that returns the module and its example "
            'inputs, and give "package.module:factory" as the model.'
        )
    ordered = sorted(entries, key=accepted.index)
    inputs = {name: entries[name][0] for name in ordered}
    return Examples(inputs, {name: entries[name][1] for name in ordered})


def _entries(request: _Request, accepted: set[str]) -> Iterator[_Entry]:
    config = request.model.config
    if "input_ids" in accepted and _reads_text(request.model):
        yield from _text(request, accepted)
    if "pixel_values" in accepted and _sees_images(config):
        yield _image(request)
    if "input_features" in accepted and (entry := _spectrogram(request)):
        yield entry
    if "input_values" in accepted:
        yield _sound(request)
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        yield _decoder(request)


def _reads_text(model: Any) -> bool:
    return model.main_input_name == "input_ids" or hasattr(_text_config(model.config), "vocab_size")


def _sees_images(config: Any) -> bool:
    """Tell whether pixels are an input of their own, not spliced into the text at a placeholder token."""
    in_text = any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))
    return not in_text and _image_config(config) is not None


def _text(request: _Request, accepted: set[str]) -> Iterator[_Entry]:
    config = _text_config(request.model.config)
    longest = _positions(request.model, config)
    length = _length(request, longest, DEFAULT_LENGTH)
    axes = _token_axes("length", longest)
    shape = (request.batch, length)
    yield "input_ids", _tokens(config, shape, request.seed), axes
    if "attention_mask" in accepted:
        yield "attention_mask", torch.ones(shape, dtype=torch.int64), axes
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        yield "token_type_ids", torch.zeros(shape, dtype=torch.int64), axes


def _decoder(request: _Request) -> _Entry:
    config = _text_config(request.model.config)
    longest = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    length = min(DECODER_LENGTH, longest or DECODER_LENGTH)
    tokens = _tokens(config, (request.batch, length), request.seed)
    start = getattr(request.model.config, "decoder_start_token_id", None)
    if start is not None:
        tokens[:, 0] = start
    return "decoder_input_ids", tokens, _token_axes("decoder_length", longest)


def _image(request: _Request) -> _Entry:
    config = _image_config(request.model.config)
    size = config.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    frames = getattr(config, "num_frames", None)
    shape = (request.batch, *([frames] if frames else []), getattr(config, "num_channels", 3), height, width)
    # a contrastive model compares any number of images with any number of texts
    name = "image_batch" if hasattr(request.model.config, "text_config") else "batch"
    return "pixel_values", torch.randn(shape, generator=request.seed), {0: name}


def _spectrogram(request: _Request) -> _Entry | None:
    config = request.model.config
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        return None
    # the encoder's second convolution has stride two
    shape = (request.batch, bins, 2 * positions)
    return "input_features", torch.randn(shape, generator=request.seed), {0: "batch"}


def _sound(request: _Request) -> _Entry:
    config = request.model.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        shape: tuple[int, ...] = (request.batch, config.max_length, config.num_mel_bins)
    else:
        shape = (request.batch, AUDIO_SAMPLES)
    return "input_values", torch.randn(shape, generator=request.seed), {0: "batch"}


def _tokens(config: Any, shape: tuple[int, int], seed: torch.Generator) -> torch.Tensor:
    """Draw token ids from the vocabulary, special tokens excluded; each row ends with the end-of-text token.

    Padding ids would move the positions of RoBERTa's tokens, and models that pool at the end-of-text token
    need exactly one.
    """
    special = {
        value for name, value in config.to_dict().items() if name.endswith("token_id") and isinstance(value, int)
    }
    ordinary = torch.tensor([index for index in range(config.vocab_size) if index not in special] or [0])
    tokens = ordinary[torch.randint(len(ordinary), shape, generator=seed)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        tokens[:, -1] = end
    return tokens


def _length(request: _Request, longest: int | None, default: int) -> int:
    if request.length is None:
        return min(default, longest or default)
    if longest is not None and request.length > longest:
        raise UsageError(
            f"The length {request.length} is more than the {longest} positions of "
            f"{type(request.model).__name__}. Give a length of at most {longest}."
        )
    return request.length


def _positions(model: Any, config: Any) -> int | None:
    """Return the most tokens the model can take, or None where its positions are relative and unbounded."""
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding index on
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _token_axes(name: str, longest: int | None) -> dict[int, Dim]:
    return {0: "batch", 1: (name, 1, longest) if longest else name}


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _image_config(config: Any) -> Any:
    parts = (config, getattr(config, "vision_config", None), getattr(config, "encoder", None))
    return next((part for part in parts if hasattr(part, "image_size")), None)
