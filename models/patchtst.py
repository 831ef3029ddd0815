"""PatchTST: forecasting from patches of each variable's own history.

Nie et al., "A Time Series is Worth 64 Words", arXiv 2211.14730: every variable is a series by itself (weights are
shared), normalized by its own mean and deviation; overlapping patches of it are the tokens of an encoder with batch
norm, whose flattened result one linear layer maps to the whole horizon.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Mlp, draw_weights, position_parameter
from xformopt.models.examples import example_noise

__all__ = ["ARCHITECTURES", "PatchTst", "PatchTstConfig", "standardize"]


@dataclass(frozen=True)
class PatchTstConfig:
    """A PatchTST.

    Attributes:
        length: Time steps seen.
        horizon: Time steps forecast.
        variables: Series that run side by side.
        patch: Time steps of a patch.
        stride: Time steps between patches.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        hidden: Hidden width of the MLP.

    """

    length: int = 96
    horizon: int = 24
    variables: int = 4
    patch: int = 16
    stride: int = 8
    width: int = 128
    depth: int = 3
    heads: int = 8
    hidden: int = 256

    @property
    def patches(self) -> int:
        """Tokens of a series, which is first prolonged by one stride of its last value."""
        return (self.length - self.patch) // self.stride + 2


def standardize(series: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``[B, T, V]`` without its mean and deviation over time, and these two, ``[B, 1, V]``."""
    mean = series.mean(1, keepdim=True)
    centered = series - mean
    deviation = (centered.square().mean(1, keepdim=True) + eps).sqrt()
    return centered / deviation, mean, deviation


class ChannelNorm(nn.Module):
    """Batch norm over the channels of ``[B, T, C]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        x = self.norm(x.transpose(1, 2))
        return x.transpose(1, 2)


class PatchBlock(nn.Module):
    """A post-norm transformer block whose norms are batch norms."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), ChannelNorm(width)
        self.mlp, self.mlp_norm = Mlp(width, hidden), ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        x = self.attention_norm(x + self.attention(x))
        x = self.mlp_norm(x + self.mlp(x))
        return x


class PatchTst(nn.Module):
    """Forecaster: ``series`` ``[B, T, V]`` to ``forecast`` ``[B, horizon, V]``."""

    def __init__(self, config: PatchTstConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.patch, config.width)
        self.positions = position_parameter(config.patches, config.width)
        self.blocks = nn.Sequential(
            *(PatchBlock(config.width, config.heads, config.hidden) for _ in range(config.depth))
        )
        self.head = nn.Linear(config.patches * config.width, config.horizon)
        draw_weights(self)

    def forward(self, series: Tensor) -> dict[str, Tensor]:
        """Return ``{"forecast": [B, horizon, V]}``."""
        series, mean, deviation = standardize(series)
        x = series.transpose(1, 2).flatten(0, 1)  # [B * V, T]
        x = torch.cat([x, x[:, -1:].expand(-1, self.config.stride)], 1)
        x = x.unfold(1, self.config.patch, self.config.stride)  # [B * V, patches, patch]
        x = self.blocks(self.embedding(x) + self.positions)  # [B * V, patches, C]
        x = self.head(x.flatten(1))  # [B * V, horizon]
        forecast = x.unflatten(0, (-1, self.config.variables)).transpose(1, 2)  # [B, horizon, V]
        return {"forecast": forecast * deviation + mean}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two noisy histories."""
        return {"series": example_noise(2, self.config.length, self.config.variables)}


ARCHITECTURES = (
    Architecture(
        "patchtst",
        lambda: PatchTst(PatchTstConfig()),
        ("Nie et al. 2022, A Time Series is Worth 64 Words, arXiv 2211.14730",),
        "PatchTST, 24 steps ahead from 96, 0.4 M parameters",
    ),
)
