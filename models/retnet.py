"""RetNet: retention in place of attention (Sun et al., arXiv 2307.08621)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from xformopt.kernels.definition import xf
from xformopt.models.architecture import Architecture
from xformopt.models.sequence import LanguageModel, norm

__all__ = ["ARCHITECTURES", "RetNet", "RetNetConfig"]


@dataclass(frozen=True)
class RetNetConfig:
    """Sizes of a RetNet; ``value_ratio`` and ``hidden_ratio`` are widths over the model's."""

    vocabulary: int = 512
    width: int = 128
    layers: int = 4
    heads: int = 4
    value_ratio: int = 2
    hidden_ratio: int = 2
    rotary_base: float = 10_000.0


class Retention(nn.Module):
    """Multi-scale retention, equation 8: each head forgets at its own pace, and is normalised by itself."""

    decay: torch.Tensor
    frequency: torch.Tensor

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        width, values = config.width, config.width * config.value_ratio
        self.heads = config.heads
        self.depth = width // config.heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, values, bias=False)
        self.gate = nn.Linear(width, values, bias=False)
        self.output = nn.Linear(values, width, bias=False)
        gamma = 1 - 2.0 ** (-5 - torch.arange(config.heads, dtype=torch.float64))
        self.register_buffer("decay", gamma.log().float())
        halves = torch.arange(0, self.depth, 2) / self.depth
        self.register_buffer("frequency", config.rotary_base**-halves)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        angles = torch.arange(x.shape[1], device=x.device).unsqueeze(-1) * self.frequency  # [T, D / 2]
        turn = partial(xf.rope, cos=angles.cos()[None], sin=angles.sin()[None], heads=self.heads, interleaved=True)
        retained = xf.retention(
            turn(self.query(x)),
            turn(self.key(x)),
            self.value(x),
            self.decay,
            heads=self.heads,
            scale=self.depth**-0.5,
        )  # [B, T, C * value_ratio]
        normalized = xf.layer_norm(retained, eps=1e-6, groups=self.heads)
        output: torch.Tensor = self.output(functional.silu(self.gate(x)) * normalized)
        return output


class Block(nn.Module):
    """Retention and a feed-forward network, each behind a norm and beside a residual."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        hidden = config.width * config.hidden_ratio
        self.retention_norm = norm(config.width)
        self.retention = Retention(config)
        self.feed_forward_norm = norm(config.width)
        self.up = nn.Linear(config.width, hidden)
        self.down = nn.Linear(hidden, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        x = x + self.retention(self.retention_norm(x))
        y: torch.Tensor = x + self.down(functional.gelu(self.up(self.feed_forward_norm(x))))
        return y


class RetNet(LanguageModel):
    """A RetNet language model."""

    def __init__(self, config: RetNetConfig | None = None) -> None:
        config = config or RetNetConfig()
        super().__init__(config.vocabulary, config.width, (Block(config) for _ in range(config.layers)))


ARCHITECTURES = (
    Architecture(
        name="retnet-small",
        module=RetNet,
        sources=(
            "Sun et al., Retentive Network: A Successor to Transformer for Large Language Models, arXiv 2307.08621",
        ),
        summary="language model with multi-scale retention, 4 layers of width 128",
    ),
)
