"""A Hugging Face architecture from a small random config: how to make it, its inputs, and what lifting must find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Inputs = Callable[[int, int, str], dict[str, torch.Tensor]]

VOCABULARY = 97
IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**IDS, **BASE, "max_position_embeddings": 40}
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
VISION = {**BASE, "image_size": 16, "patch_size": 8}
BART = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "max_position_embeddings": 40,
    "use_cache": False,
}
T5 = {
    **IDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
SPEECH = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
WHISPER = {
    **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 12,
}


def padding_mask(batch: int, length: int, side: str) -> torch.Tensor:
    """Return a ``[B, S]`` mask whose later rows are padded on ``side`` (``none``: nowhere); every row keeps a key."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        padded = 0 if side == "none" else min((row + 1) * length // (batch + 2), length - 1)
        if padded:
            mask[row, slice(0, padded) if side == "left" else slice(length - padded, length)] = 0
    return mask


def text(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Token ids and their padding mask."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": padding_mask(batch, length, side)}


def ended_text(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """As :func:`text`, with the end token (the highest id) at the last valid position, where CLIP pools."""
    inputs = text(batch, length, side)
    inputs["input_ids"].clamp_(max=VOCABULARY - 2)
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row[int(mask.nonzero().max())] = VOCABULARY - 1
    return inputs


def pair(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """An encoder's tokens with their mask, and a decoder's."""
    decoder = torch.randint(3, VOCABULARY, (batch, max(1, length - 2)))
    return {**text(batch, length, side), "decoder_input_ids": decoder}


def image(batch: int, length: int, side: str, size: int = 16) -> dict[str, torch.Tensor]:
    """Images; their length does not vary."""
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def large_image(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Images for hierarchical models, which halve them several times."""
    return image(batch, length, side, 32)


def speech(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Raw audio of a fixed length."""
    return {"input_values": torch.randn(batch, 400)}


def mel(batch: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Whisper's log-mel features, two frames for each position."""
    return {"input_features": torch.randn(batch, 8, 40)}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: For test ids.
        model: Name of the class in ``transformers``; an attribute of the model may follow after a dot.
        config: Name of its configuration class.
        options: Small sizes.
        inputs: Makes inputs from batch, length and padding side.
        attentions: ``xf.attention`` operators expected in the lifted Program.
        longest: The longest length the model allows, at most 40.
        only: The attention implementations it has.
        expect: Keyword arguments that every attention must have, or those of each layer.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    inputs: Inputs
    attentions: int
    longest: int = 40
    only: tuple[str, ...] = ("eager", "sdpa")
    expect: Mapping[str, Any] | tuple[Mapping[str, Any], ...] = ()

    def make(self, implementation: str) -> torch.nn.Module:
        """Return the model with random weights."""
        import transformers

        kind, _, part = self.model.partition(".")
        config = getattr(transformers, self.config)(**self.options, attn_implementation=implementation)
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            # fresh models have unit norms, zero biases and tiny weights, which hide mistakes
            if value.dim() == 1 or "table" in name or "bias" in name:
                value.normal_(1.0 if "norm" in name.lower() and "weight" in name else 0.0, 0.3)
            else:
                value.mul_(3.0)
        chosen: torch.nn.Module = model.get_submodule(part) if part else model
        return chosen


CAUSAL = {"causal": True, "window_left": -1}
FULL = {"causal": False, "window_left": -1, "window_right": -1}
