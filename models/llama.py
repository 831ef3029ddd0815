"""Llama: a causal language model with rotary positions, RMSNorm, SwiGLU and grouped-query attention.

Touvron et al., "LLaMA", arXiv 2302.13971, with the grouped queries of Llama 2 (arXiv 2307.09288).  With ``window``, a
token sees only the ``window`` latest positions, itself included, as in Mistral 7B (Jiang et al., arXiv 2310.06825).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Isotropic
from xformopt.models.blocks import Block, GatedMlp, draw_weights, merge_heads, split_heads
from xformopt.models.examples import example_tokens

__all__ = ["ARCHITECTURES", "Llama", "LlamaConfig"]

_EXAMPLE_LENGTH = 16


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama.

    Attributes:
        vocabulary: Token ids.
        length: Longest sequence it is meant for; nothing in it depends on this but ``example_inputs()``.
        width: Channels of a token.
        depth: Blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        hidden: Hidden width of the gated MLP.
        window: Positions a token sees; None: all before it.
        tied: Whether the output layer is the embedding matrix.
        rope_base: Base of the rotary angles.
        eps: Of the norms.

    """

    vocabulary: int = 256
    length: int = 512
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 344
    window: int | None = None
    tied: bool = True
    rope_base: float = 10_000.0
    eps: float = 1e-5


def rotary_angles(length: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[T, width]``; features i and ``i + width / 2`` turn together (arXiv 2104.09864)."""
    frequencies = base ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * frequencies  # [T, width / 2]
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features of ``[B, H, T, D]`` by its position's angle."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RotaryAttention(nn.Module):
    """Causal grouped-query attention on rotated queries and keys."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        kv_width = config.width // config.heads * config.kv_heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, T, C]`` to the same shape; ``mask`` ``[T, T]`` is True where seen, None is plainly causal."""
        q = rotate(split_heads(self.query(x), self.heads), cos, sin)  # [B, H, T, D]
        k = rotate(split_heads(self.key(x), self.kv_heads), cos, sin)  # [B, G, T, D]
        v = split_heads(self.value(x), self.kv_heads)
        x = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.heads
        )
        x = self.output(merge_heads(x))
        return x


class Llama(nn.Module):
    """Language model: ``input_ids`` ``[B, T]`` int64 to ``logits`` ``[B, T, V]`` of each next token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.backbone = Isotropic(
            [
                Block(config.width, RotaryAttention(config), GatedMlp(config.width, config.hidden), self._norm)
                for _ in range(config.depth)
            ],
            self._norm(config.width),
        )
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        draw_weights(self)
        if config.tied:
            self.head.weight = self.tokens.weight

    def _norm(self, width: int) -> nn.Module:
        return nn.RMSNorm(width, self.config.eps)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, T, V]}``."""
        length, device = input_ids.shape[1], input_ids.device
        cos, sin = rotary_angles(length, self.config.width // self.config.heads, self.config.rope_base, device)
        x = self.backbone(self.tokens(input_ids), cos, sin, self._mask(length, device))
        return {"logits": self.head(x)}

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        """Return which keys each query sees, ``[T, T]``; None for all before it."""
        if self.config.window is None:
            return None
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions[None, :]
        return (distance >= 0) & (distance < self.config.window)

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two short sequences."""
        return {"input_ids": example_tokens(self.config.vocabulary, min(_EXAMPLE_LENGTH, self.config.length))}


_LLAMA = "Touvron et al. 2023, LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971"
_GROUPED = "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models, arXiv 2305.13245"
_MISTRAL = "Jiang et al. 2023, Mistral 7B, arXiv 2310.06825"

ARCHITECTURES = (
    Architecture(
        "llama-tiny", lambda: Llama(LlamaConfig()), (_LLAMA, _GROUPED), "Llama's form over bytes, 0.8 M parameters"
    ),
    Architecture(
        "llama-window",
        lambda: Llama(LlamaConfig(window=8)),
        (_MISTRAL, _LLAMA, _GROUPED),
        "Llama whose tokens see the 8 latest positions, 0.8 M parameters",
    ),
    Architecture(
        "llama-160m",
        lambda: Llama(
            LlamaConfig(
                vocabulary=32000, length=2048, width=768, depth=12, heads=12, kv_heads=12, hidden=3072, tied=False
            )
        ),
        (_LLAMA,),
        "Llama of the size of GPT-2, 162 M parameters",
    ),
)
