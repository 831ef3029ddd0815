"""The models that the measurements in ``tools/results`` are made on: real sizes, random weights, Hugging Face code.

Every factory returns a module and example inputs, so ``xformopt optimize tools.reference_models:bert_base`` style
specs work too.  MiniLM alone has real pretrained weights; it is the zoo name ``minilm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SEED = 0


class _Flat(torch.nn.Module):
    """A Hugging Face model with explicit inputs that returns its first output under a name."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.output = output
        self.eval()


class TextModel(_Flat):
    """Takes ``input_ids`` and ``attention_mask``, both ``[B, T]``."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the named output."""
        result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {self.output: result[self.output]}


class ImageModel(_Flat):
    """Takes ``pixel_values``, ``[B, 3, H, W]``."""

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the named output."""
        return {self.output: self.model(pixel_values=pixel_values)[self.output]}


def _seeded(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(SEED)
    model = build().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def text_inputs(vocabulary: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids and a mask without padding."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(batch: int, size: int = 224) -> dict[str, torch.Tensor]:
    """Random normalized pixels."""
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED))}


def bert_base(attention: str = "sdpa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """BERT-base: 12 layers, width 768, length 128."""
    from transformers import BertConfig, BertModel

    config = BertConfig(attn_implementation=attention)
    model = _seeded(lambda: BertModel(config, add_pooling_layer=False))
    return TextModel(model, ("input_ids", "attention_mask"), "last_hidden_state"), text_inputs(
        config.vocab_size, 1, 128
    )


def vit_b16(attention: str = "sdpa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """ViT-B/16 at 224 x 224: 197 tokens."""
    from transformers import ViTConfig, ViTModel

    model = _seeded(lambda: ViTModel(ViTConfig(attn_implementation=attention), add_pooling_layer=False))
    return ImageModel(model, ("pixel_values",), "last_hidden_state"), image_inputs(1)


def deit_s(attention: str = "sdpa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """DeiT-S: width 384, 6 heads, 198 tokens (class and distillation token)."""
    from transformers import DeiTConfig, DeiTModel

    config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, attn_implementation=attention)
    model = _seeded(lambda: DeiTModel(config, add_pooling_layer=False))
    return ImageModel(model, ("pixel_values",), "last_hidden_state"), image_inputs(1)


def gpt2(attention: str = "sdpa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """GPT-2 (124M) with its language-model head, length 256."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(use_cache=False, attn_implementation=attention)
    model = _seeded(lambda: GPT2LMHeadModel(config))
    return TextModel(model, ("input_ids", "attention_mask"), "logits"), text_inputs(config.vocab_size, 1, 256)


def llama_12(attention: str = "sdpa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A 12-layer Llama-style model: width 768, 12 heads on 4 key/value heads, SwiGLU 2048, length 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        max_position_embeddings=2048,
        use_cache=False,
        attn_implementation=attention,
    )
    model = _seeded(lambda: LlamaForCausalLM(config))
    return TextModel(model, ("input_ids", "attention_mask"), "logits"), text_inputs(config.vocab_size, 1, 256)


def minilm(attention: str = "sdpa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """All-MiniLM-L6-v2 with its pretrained weights, length 128."""
    from xformopt.capture.huggingface import load_directory, minilm_directory

    source = load_directory(minilm_directory(), length=128, attention=attention)
    return source.module, source.example_inputs


# model -> (factory, largest length of its positions; None for images)
REFERENCE: dict[str, tuple[Callable[..., tuple[torch.nn.Module, dict[str, torch.Tensor]]], int | None]] = {
    "minilm": (minilm, 512),
    "bert-base": (bert_base, 512),
    "vit-b16": (vit_b16, None),
    "deit-s": (deit_s, None),
    "gpt2": (gpt2, 1024),
    "llama-12": (llama_12, 2048),
}


def dynamic_axes(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """Batch of every input; length of text, bounded by the positions the model has."""
    longest = REFERENCE[name][1]
    axes: dict[str, dict[int, Any]] = {}
    for key in inputs:
        axes[key] = {0: "batch"} if longest is None else {0: "batch", 1: ("length", 1, longest)}
    return axes
