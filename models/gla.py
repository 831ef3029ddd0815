"""GLA: a language model with gated linear attention (Yang et al., arXiv 2312.06635)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from xformopt.kernels.definition import xf
from xformopt.models.architecture import Architecture
from xformopt.models.sequence import FeedForward, LanguageModel, norm

__all__ = ["ARCHITECTURES", "Gla", "GlaConfig"]


@dataclass(frozen=True)
class GlaConfig:
    """Sizes of a GLA model; keys have half the model's width.

    Attributes:
        gate_rank: Rank of the projection that makes the gates.
        gate_temperature: ``tau``: gates are a sigmoid to the power of ``1 / tau``, hence close to one.

    """

    vocabulary: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 352
    gate_rank: int = 16
    gate_temperature: float = 16.0


class GatedLinearAttention(nn.Module):
    """The layer of section 4.4: a gate for each channel of a key, a norm for each head, a swish output gate."""

    def __init__(self, config: GlaConfig) -> None:
        super().__init__()
        width, keys = config.width, config.width // 2
        self.heads = config.heads
        self.scale = (keys // config.heads) ** -0.5
        self.temperature = config.gate_temperature
        self.query = nn.Linear(width, keys, bias=False)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.gate_down = nn.Linear(width, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, keys)
        self.output_gate = nn.Linear(width, width)
        self.output = nn.Linear(width, width, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(width // config.heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        gate = functional.logsigmoid(self.gate_up(self.gate_down(x))) / self.temperature  # [B, T, C / 2]
        attended = xf.gated_linear_attention(
            self.query(x), self.key(x), self.value(x), gate, heads=self.heads, scale=self.scale
        )
        normalized = xf.rms_norm(attended, self.norm_weight, eps=1e-5, groups=self.heads)
        output: torch.Tensor = self.output(functional.silu(self.output_gate(x)) * normalized)
        return output


class Block(nn.Module):
    """Gated linear attention and SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, config: GlaConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config.width)
        self.attention = GatedLinearAttention(config)
        self.feed_forward_norm = norm(config.width)
        self.feed_forward = FeedForward(config.width, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        x = x + self.attention(self.attention_norm(x))
        y: torch.Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y


class Gla(LanguageModel):
    """A GLA language model."""

    def __init__(self, config: GlaConfig | None = None) -> None:
        config = config or GlaConfig()
        super().__init__(config.vocabulary, config.width, (Block(config) for _ in range(config.layers)))


ARCHITECTURES = (
    Architecture(
        name="gla-small",
        module=Gla,
        sources=(
            "Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635",
        ),
        summary="language model with gated linear attention, 4 layers of width 128",
    ),
)
