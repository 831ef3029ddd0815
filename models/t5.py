"""T5: an encoder with relative position biases, alone or with its decoder.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683:
RMS norms before each part, no biases in linear layers, logits that are not scaled, and one table of biases per stack,
by head and bucket of the distance: half of the buckets hold one distance each, the other half grow logarithmically.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Isotropic
from xformopt.models.blocks import Attention, Block, CrossBlock, GatedMlp, draw_weights
from xformopt.models.examples import example_mask, example_tokens

__all__ = ["ARCHITECTURES", "T5", "T5Config", "T5Encoder"]

_EXAMPLE_LENGTH = 16


@dataclass(frozen=True)
class T5Config:
    """A T5 (version 1.1: gated GELU, separate output layer).

    Attributes:
        vocabulary: Token ids.
        width: Channels of a token.
        depth: Blocks of each stack.
        heads: Attention heads.
        head_width: Channels of a head.
        hidden: Hidden width of the gated MLP.
        buckets: Buckets of distances.
        farthest: Distance from which on all share the last bucket.
        eps: Of the norms.

    """

    vocabulary: int = 256
    width: int = 128
    depth: int = 3
    heads: int = 4
    head_width: int = 32
    hidden: int = 256
    buckets: int = 32
    farthest: int = 128
    eps: float = 1e-6


class RelativeBias(nn.Module):
    """One learned number per head and bucket of the distance between query and key."""

    def __init__(self, heads: int, buckets: int, farthest: int, bidirectional: bool) -> None:
        super().__init__()
        self.buckets, self.farthest, self.bidirectional = buckets, farthest, bidirectional
        self.table = nn.Embedding(buckets, heads)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Return the bias ``[1, heads, queries, keys]``."""
        device = self.table.weight.device
        distance = torch.arange(keys, device=device)[None, :] - torch.arange(queries, device=device)[:, None]
        bias: Tensor = self.table(self._bucket(distance))  # [T, S, H]
        return bias.permute(2, 0, 1)[None]

    def _bucket(self, distance: Tensor) -> Tensor:
        """Return the bucket of ``key - query`` position; what lies ahead has buckets of its own, or bucket 0."""
        buckets = self.buckets
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            first = torch.zeros_like(distance)
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        # the logarithm is taken of at least `exact`, so that no zero comes near it
        growth = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.farthest / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)


def _attention(config: T5Config) -> Attention:
    return Attention(config.width, config.heads, head_width=config.head_width, bias=False, scale=1.0)


def _mlp(config: T5Config) -> GatedMlp:
    return GatedMlp(config.width, config.hidden, lambda: nn.GELU(approximate="tanh"))


def _padding(attention_mask: Tensor) -> Tensor:
    """``[B, S]``, 0 on padding, to what is added to logits: ``[B, 1, 1, S]``."""
    hidden = (attention_mask == 0)[:, None, None, :]
    return hidden.float() * torch.finfo(torch.float32).min


class Encoder(nn.Module):
    """Embedded tokens ``[B, T, C]`` to the memory of the same shape."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.bias = RelativeBias(config.heads, config.buckets, config.farthest, bidirectional=True)
        self.backbone = Isotropic(
            (
                Block(config.width, _attention(config), _mlp(config), lambda width: nn.RMSNorm(width, config.eps))
                for _ in range(config.depth)
            ),
            nn.RMSNorm(config.width, config.eps),
        )

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Mix the tokens under their padding mask ``[B, T]``."""
        bias = self.bias(x.shape[1], x.shape[1]) + _padding(attention_mask)  # [B, H, T, T]
        x = self.backbone(x, bias)
        return x


class T5Encoder(nn.Module):
    """Encoder alone: ``input_ids`` and ``attention_mask`` ``[B, T]`` to ``hidden`` ``[B, T, C]``."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Encoder(config)
        # T5's embeddings and biases are of unit size; its logits, which nothing scales, ask for small queries
        draw_weights(self, config.width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return ``{"hidden": [B, T, C]}``; ``attention_mask`` is 1 on tokens and 0 on padding."""
        return {"hidden": self.encoder(self.tokens(input_ids), attention_mask)}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two short sequences, one of them padded."""
        ids = example_tokens(self.config.vocabulary, _EXAMPLE_LENGTH)
        return {"input_ids": ids, "attention_mask": example_mask(_EXAMPLE_LENGTH)}


class T5(nn.Module):
    """Encoder and decoder: source and target tokens to ``logits`` ``[B, U, V]`` of each next target token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Encoder(config)
        self.bias = RelativeBias(config.heads, config.buckets, config.farthest, bidirectional=False)
        self.decoder = Isotropic(
            (
                CrossBlock(
                    config.width,
                    _attention(config),
                    _attention(config),
                    _mlp(config),
                    lambda width: nn.RMSNorm(width, config.eps),
                )
                for _ in range(config.depth)
            ),
            nn.RMSNorm(config.width, config.eps),
        )
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        draw_weights(self, config.width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, U, V]}`` from source ``[B, T]``, its padding mask and target ``[B, U]``."""
        memory = self.encoder(self.tokens(input_ids), attention_mask)  # [B, T, C]
        length, device = decoder_input_ids.shape[1], decoder_input_ids.device
        positions = torch.arange(length, device=device)
        ahead = (positions[None, :] > positions[:, None]).float() * torch.finfo(torch.float32).min  # [U, U]
        bias = self.bias(length, length) + ahead
        x = self.decoder(self.tokens(decoder_input_ids), memory, bias, attention_mask[:, None, None, :] != 0)
        return {"logits": self.head(x)}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two short pairs of sequences, one source padded."""
        ids = example_tokens(self.config.vocabulary, _EXAMPLE_LENGTH)
        mask = example_mask(_EXAMPLE_LENGTH)
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, : _EXAMPLE_LENGTH // 2 + 1]}


_SOURCES = (
    "Raffel et al. 2019, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, "
    "arXiv 1910.10683",
)

ARCHITECTURES = (
    Architecture("t5-encoder", lambda: T5Encoder(T5Config()), _SOURCES, "T5's encoder over bytes, 0.5 M parameters"),
    Architecture("t5-tiny", lambda: T5(T5Config()), _SOURCES, "T5, encoder and decoder, over bytes, 1.2 M parameters"),
)
