"""Restormer: image restoration by a U-shaped transformer that attends between channels.

Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", arXiv 2111.09881: multi-Dconv
head transposed attention (queries, keys and values from 1 x 1 and depthwise 3 x 3 convolutions, ``softmax(a q k^T)``
over channels) and a gated-Dconv feed-forward network; pixel-unshuffle and -shuffle between levels, concatenation with
the encoder's map on the way up, refinement blocks, and the result is added to the input image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Restormer", "RestormerConfig"]


@dataclass(frozen=True)
class RestormerConfig:
    """A Restormer; the tuples have one entry for each level, from full resolution to the coarsest.

    Attributes:
        image_size: Side of the example image; the network takes any that all levels divide.
        in_channels: Its channels.
        width: Channels of the first level; each further one doubles them.
        depths: Blocks of a level (on the way down, and again on the way up).
        heads: Heads of channel attention.
        refinement: Blocks at full resolution at the end.
        expansion: Hidden width of the feed-forward network over the width.

    """

    image_size: int = 32
    in_channels: int = 3
    width: int = 24
    depths: tuple[int, ...] = (1, 1, 2)
    heads: tuple[int, ...] = (1, 2, 4)
    refinement: int = 1
    expansion: float = 2.66


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        x = self.norm(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


class TransposedAttention(nn.Module):
    """Each channel of a head becomes a mixture of that head's channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.neighbours = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False)
        self.output = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        qkv = self.neighbours(self.qkv(x)).flatten(2)  # [B, 3 * C, H * W]
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, 1))  # [B, heads, D, H * W]
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        weights = (q @ k.transpose(-1, -2) * self.temperature).softmax(-1)  # [B, heads, D, D]
        mixed = (weights @ v).flatten(1, 2).unflatten(2, x.shape[2:])
        x = self.output(mixed)
        return x


class GatedDepthwiseNetwork(nn.Module):
    """Two maps of depthwise neighbourhoods, one of which gates the other through GELU."""

    def __init__(self, width: int, expansion: float) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.widen = nn.Conv2d(width, 2 * hidden, 1, bias=False)
        self.neighbours = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.narrow = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        gate, value = self.neighbours(self.widen(x)).chunk(2, 1)
        x = self.narrow(functional.gelu(gate) * value)
        return x


class RestormerBlock(nn.Module):
    """Channel attention and feed-forward network on residual paths, on maps instead of tokens."""

    def __init__(self, width: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(ChannelLayerNorm(width), TransposedAttention(width, heads))
        self.network = nn.Sequential(ChannelLayerNorm(width), GatedDepthwiseNetwork(width, expansion))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        x = x + self.attention(x)
        x = x + self.network(x)
        return x


def shrink(width: int) -> nn.Sequential:
    """Return the step down: half the sides, twice the channels."""
    return nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))


def grow(width: int) -> nn.Sequential:
    """Return the step up: twice the sides, half the channels."""
    return nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.PixelShuffle(2))


class Restormer(nn.Module):
    """Restorer: ``pixel_values`` ``[B, C, H, W]`` to ``image`` of the same shape."""

    def __init__(self, config: RestormerConfig) -> None:
        super().__init__()
        self.config = config
        levels = range(len(config.depths))
        widths = [config.width << level for level in levels]
        self.embedding = nn.Conv2d(config.in_channels, config.width, 3, padding=1, bias=False)
        self.down = nn.ModuleList(self._level(widths[level], level) for level in levels)
        self.shrink = nn.ModuleList(shrink(width) for width in widths[:-1])
        self.grow = nn.ModuleList(grow(width) for width in widths[1:])
        # the full resolution keeps both halves of the concatenation; below, a 1 x 1 convolution halves them again
        self.reduce = nn.ModuleList(
            nn.Conv2d(2 * width, width, 1, bias=False) if level else nn.Identity()
            for level, width in enumerate(widths[:-1])
        )
        self.up = nn.ModuleList(
            self._level(width if level else 2 * width, level) for level, width in enumerate(widths[:-1])
        )
        self.refinement = self._level(2 * config.width, 0, config.refinement)
        self.output = nn.Conv2d(2 * config.width, config.in_channels, 3, padding=1, bias=False)

    def _level(self, width: int, level: int, depth: int | None = None) -> nn.Sequential:
        depth, heads = self.config.depths[level] if depth is None else depth, self.config.heads[level]
        return nn.Sequential(*(RestormerBlock(width, heads, self.config.expansion) for _ in range(depth)))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"image": [B, C, H, W]}``."""
        x = self.embedding(pixel_values)  # [B, width, H, W]
        passed: list[Tensor] = []
        for blocks, smaller in zip(self.down[:-1], self.shrink, strict=True):
            x = blocks(x)
            passed.append(x)
            x = smaller(x)
        x = self.down[-1](x)
        for level in reversed(range(len(passed))):
            x = self.reduce[level](torch.cat([self.grow[level](x), passed[level]], 1))
            x = self.up[level](x)
        return {"image": self.output(self.refinement(x)) + pixel_values}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Zamir et al. 2021, Restormer: Efficient Transformer for High-Resolution Restoration, arXiv 2111.09881",)

ARCHITECTURES = (
    Architecture(
        "restormer-micro",
        lambda: Restormer(RestormerConfig()),
        _SOURCES,
        "Restormer with three levels for small images, 0.6 M parameters",
    ),
)
