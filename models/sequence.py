"""What the recurrent language models share: embedding, gated feed-forward, causal convolution, the stack of blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

__all__ = ["CausalConvolution", "FeedForward", "LanguageModel", "norm"]

_EPS = 1e-6
_EXAMPLE_LENGTH = 32


def norm(width: int) -> nn.RMSNorm:
    """Return the norm before a layer."""
    return nn.RMSNorm(width, eps=_EPS)


class FeedForward(nn.Module):
    """SwiGLU, ``down(silu(gate x) * up x)`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        down: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return down


class CausalConvolution(nn.Module):
    """Each channel by itself over the last ``size`` tokens, then SiLU."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.past = size - 1
        self.convolution = nn.Conv1d(width, width, size, groups=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        past = functional.pad(x.transpose(1, 2), (self.past, 0))  # [B, C, size - 1 + T]
        return functional.silu(self.convolution(past).transpose(1, 2))


class LanguageModel(nn.Module):
    """Token embedding, blocks from ``[B, T, C]`` to the same, a norm, and logits by the embedding's own matrix.

    The last norm is RMSNorm unless another is given.
    """

    def __init__(
        self, vocabulary: int, width: int, blocks: Iterable[nn.Module], last_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = last_norm or norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """``input_ids [B, T]`` to ``logits [B, T, vocabulary]``; a token sees none after it."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Return one sequence of tokens."""
        generator = torch.Generator().manual_seed(0)
        return {"input_ids": torch.randint(self.embedding.num_embeddings, (1, _EXAMPLE_LENGTH), generator=generator)}
