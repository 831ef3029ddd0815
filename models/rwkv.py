"""RWKV-4: a recurrent language model trained like a transformer (Peng et al., arXiv 2305.13048)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from xformopt.kernels.definition import xf
from xformopt.models.architecture import Architecture
from xformopt.models.sequence import LanguageModel

__all__ = ["ARCHITECTURES", "Rwkv", "RwkvConfig"]


@dataclass(frozen=True)
class RwkvConfig:
    """Sizes of an RWKV-4 model."""

    vocabulary: int = 512
    width: int = 128
    layers: int = 4
    hidden: int = 512


class TokenShift(nn.Module):
    """A mixture of each token with the one before it, a share for each channel (equations 11 to 13)."""

    def __init__(self, width: int, depth: float) -> None:
        super().__init__()
        # deeper layers look less at the token before
        self.share = nn.Parameter((torch.arange(width) / width) ** (1 - depth))

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Tokens and those before them, ``[B, T, C]``, to the same."""
        return self.share * x + (1 - self.share) * before


def _before(x: torch.Tensor) -> torch.Tensor:
    """Return the token before each, ``[B, T, C]``; zeros before the first."""
    return functional.pad(x, (0, 0, 1, 0))[:, :-1]


class TimeMixing(nn.Module):
    """The weighted mean of values so far, times a receptance gate (equations 11 to 15)."""

    def __init__(self, config: RwkvConfig, layer: int) -> None:
        super().__init__()
        width, depth = config.width, layer / config.layers
        self.receptance_shift = TokenShift(width, depth)
        self.key_shift = TokenShift(width, depth)
        self.value_shift = TokenShift(width, depth)
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        place = torch.arange(width) / (width - 1)
        self.log_rate = nn.Parameter(-5 + 8 * place ** (0.7 + 1.3 * depth))
        self.bonus = nn.Parameter(torch.full((width,), 0.3) + (torch.arange(1, width + 1) % 3 - 1) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        before = _before(x)
        receptance = torch.sigmoid(self.receptance(self.receptance_shift(x, before)))
        key, value = self.key(self.key_shift(x, before)), self.value(self.value_shift(x, before))
        mean = xf.rwkv(key, value, -self.log_rate.exp(), self.bonus)
        output: torch.Tensor = self.output(receptance * mean)
        return output


class ChannelMixing(nn.Module):
    """A feed-forward network with squared ReLU, times a receptance gate (equations 16 to 18)."""

    def __init__(self, config: RwkvConfig, layer: int) -> None:
        super().__init__()
        depth = layer / config.layers
        self.receptance_shift = TokenShift(config.width, depth)
        self.key_shift = TokenShift(config.width, depth)
        self.receptance = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.hidden, bias=False)
        self.value = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        before = _before(x)
        hidden = functional.relu(self.key(self.key_shift(x, before))).square()
        gated: torch.Tensor = torch.sigmoid(self.receptance(self.receptance_shift(x, before))) * self.value(hidden)
        return gated


class Block(nn.Module):
    """Time mixing and channel mixing, each behind a norm and beside a residual."""

    def __init__(self, config: RwkvConfig, layer: int) -> None:
        super().__init__()
        self.time_norm = nn.LayerNorm(config.width)
        self.time = TimeMixing(config, layer)
        self.channel_norm = nn.LayerNorm(config.width)
        self.channel = ChannelMixing(config, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, C]`` to the same."""
        x = x + self.time(self.time_norm(x))
        y: torch.Tensor = x + self.channel(self.channel_norm(x))
        return y


class Rwkv(LanguageModel):
    """An RWKV-4 language model."""

    def __init__(self, config: RwkvConfig | None = None) -> None:
        c = config or RwkvConfig()
        blocks = (Block(c, layer) for layer in range(c.layers))
        # the embedding is normalised too
        super().__init__(c.vocabulary, c.width, (nn.LayerNorm(c.width), *blocks), nn.LayerNorm(c.width))


ARCHITECTURES = (
    Architecture(
        name="rwkv4-small",
        module=Rwkv,
        sources=("RWKV: Reinventing RNNs for the Transformer Era (Peng et al., arXiv 2305.13048)",),
        summary="recurrent language model with time mixing and channel mixing, 4 layers of width 128",
    ),
)
