"""GPT-2: a causal language model with learned positions and pre-norm blocks.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": GELU in its tanh form, a final norm, and
the embedding matrix again as output layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Isotropic
from xformopt.models.blocks import Attention, Block, Mlp, draw_weights
from xformopt.models.examples import example_tokens

__all__ = ["ARCHITECTURES", "Gpt", "GptConfig"]

_EXAMPLE_LENGTH = 16


@dataclass(frozen=True)
class GptConfig:
    """A GPT.

    Attributes:
        vocabulary: Token ids.
        length: Longest sequence.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``width``.

    """

    vocabulary: int = 256
    length: int = 512
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0


class Gpt(nn.Module):
    """Language model: ``input_ids`` ``[B, T]`` int64 to ``logits`` ``[B, T, V]`` of each next token."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.tokens = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Embedding(config.length, width)
        gelu = partial(nn.GELU, approximate="tanh")
        self.backbone = Isotropic(
            [
                Block(width, Attention(width, config.heads, causal=True), Mlp(width, hidden, gelu))
                for _ in range(config.depth)
            ],
            nn.LayerNorm(width),
        )
        draw_weights(self)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, T, V]}``."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)  # [B, T, C]
        x = self.backbone(x)
        return {"logits": functional.linear(x, self.tokens.weight)}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two short sequences."""
        return {"input_ids": example_tokens(self.config.vocabulary, min(_EXAMPLE_LENGTH, self.config.length))}


_SOURCES = ("Radford et al. 2019, Language Models are Unsupervised Multitask Learners",)

ARCHITECTURES = (
    Architecture("gpt-tiny", lambda: Gpt(GptConfig()), _SOURCES, "GPT-2's form over bytes, 0.9 M parameters"),
    Architecture(
        "gpt2",
        lambda: Gpt(GptConfig(vocabulary=50257, length=1024, width=768, depth=12, heads=12)),
        _SOURCES,
        "GPT-2 in its smallest published size, 124 M parameters",
    ),
)
