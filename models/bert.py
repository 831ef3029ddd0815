"""BERT: a bidirectional encoder over padded tokens, with a classifier on its first token.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805: token and learned position
embeddings (a single segment, so segment embeddings are left out), post-norm blocks, a tanh pooler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Mlp, PostNormBlock, draw_weights
from xformopt.models.examples import example_mask, example_tokens

__all__ = ["ARCHITECTURES", "Bert", "BertConfig"]

_EXAMPLE_LENGTH = 16


@dataclass(frozen=True)
class BertConfig:
    """A BERT.

    Attributes:
        vocabulary: Token ids.
        length: Longest sequence.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        classes: Outputs.
        mlp_ratio: Hidden width of the MLP over ``width``.
        eps: Of the norms.

    """

    vocabulary: int = 256
    length: int = 512
    width: int = 128
    depth: int = 4
    heads: int = 4
    classes: int = 10
    mlp_ratio: float = 4.0
    eps: float = 1e-12


class Bert(nn.Module):
    """Text classifier: ``input_ids`` and ``attention_mask`` ``[B, T]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Embedding(config.length, width)
        self.embedding_norm = nn.LayerNorm(width, config.eps)
        self.blocks = nn.ModuleList(
            PostNormBlock(width, Attention(width, config.heads), Mlp(width, hidden), config.eps)
            for _ in range(config.depth)
        )
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, config.classes)
        draw_weights(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``; ``attention_mask`` is 1 on tokens and 0 on padding."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embedding_norm(self.tokens(input_ids) + self.positions(positions))  # [B, T, C]
        mask = attention_mask[:, None, None, :] != 0  # [B, 1, 1, T]
        for block in self.blocks:
            x = block(x, mask)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return {"logits": self.head(pooled)}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two short sequences, one of them padded."""
        length = min(_EXAMPLE_LENGTH, self.config.length)
        return {"input_ids": example_tokens(self.config.vocabulary, length), "attention_mask": example_mask(length)}


_SOURCES = ("Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers, arXiv 1810.04805",)

ARCHITECTURES = (
    Architecture("bert-tiny", lambda: Bert(BertConfig()), _SOURCES, "BERT's form over bytes, 0.9 M parameters"),
    Architecture(
        "bert-base",
        lambda: Bert(BertConfig(vocabulary=30522, width=768, depth=12, heads=12, classes=2)),
        _SOURCES,
        "BERT in its base size with a classifier, 109 M parameters",
    ),
)
