"""MetaFormer baselines: one pyramid, any token mixer.

Yu et al., "MetaFormer Is Actually What You Need for Vision", arXiv 2111.11418 (pooling), and "MetaFormer Baselines for
Vision", arXiv 2210.13452 (identity, random, separable convolution, attention): the architecture around the mixer does
most of the work, which the identity shows by mixing nothing between the strided convolutions.  Here all share the
second paper's block: norm without bias, StarReLU in the MLP, and no bias in linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Pyramid
from xformopt.models.blocks import Attention, Block, Grid, Identity, Mlp, draw_weights, to_map, to_tokens
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "MetaFormer", "MetaFormerConfig", "Pooling", "RandomMixing", "SeparableConvolution"]

MixerName = Literal["identity", "random", "pooling", "convolution", "attention"]


@dataclass(frozen=True)
class MetaFormerConfig:
    """A MetaFormer; the tuples have one entry for each stage.

    Attributes:
        mixers: Token mixers.
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        widths: Channels.
        depths: Blocks.
        head_width: Channels of an attention head.
        classes: Outputs.

    """

    mixers: tuple[MixerName, ...] = ("pooling", "pooling", "pooling", "pooling")
    image_size: int = 64
    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128, 160)
    depths: tuple[int, ...] = (1, 1, 2, 1)
    head_width: int = 32
    classes: int = 10


class StarRelu(nn.Module):
    """``s * relu(x)^2 + b`` with two learned numbers, at first such that normal input gives unit variance."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.8944]))
        self.shift = nn.Parameter(torch.tensor([-0.4472]))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return self.scale * functional.relu(x).square() + self.shift


class Pooling(nn.Module):
    """Mean of the 3 x 3 neighbours that exist, minus the token itself (which the residual path carries)."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        means = functional.avg_pool2d(to_map(x, self.grid), 3, stride=1, padding=1, count_include_pad=False)
        return to_tokens(means) - x


class RandomMixing(nn.Module):
    """A ``[T, T]`` matrix with rows that sum to one, drawn once and never trained."""

    mixing: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.rand(tokens, tokens).softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        return self.mixing @ x


class SeparableConvolution(nn.Module):
    """Inverted separable convolution of MobileNetV2: widen, StarReLU, depthwise 7 x 7, narrow."""

    def __init__(self, width: int, grid: Grid, expansion: int = 2, kernel: int = 7) -> None:
        super().__init__()
        self.grid = grid
        hidden = width * expansion
        self.widen = nn.Linear(width, hidden, bias=False)
        self.activation = StarRelu()
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.narrow = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        x = self.activation(self.widen(x))
        x = self.narrow(to_tokens(self.depthwise(to_map(x, self.grid))))
        return x


class MetaFormer(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Pyramid(config.in_channels, config.image_size, config.widths, config.depths, self._block, _norm)
        self.head_norm = nn.LayerNorm(config.widths[-1])
        self.head = nn.Linear(config.widths[-1], config.classes)
        draw_weights(self)

    def _block(self, stage: int, grid: Grid) -> Block:
        width = self.config.widths[stage]
        mlp = Mlp(width, 4 * width, StarRelu, bias=False)
        return Block(width, self._mixer(self.config.mixers[stage], width, grid), mlp, _norm)

    def _mixer(self, name: MixerName, width: int, grid: Grid) -> nn.Module:
        match name:
            case "identity":
                return Identity()
            case "random":
                return RandomMixing(grid[0] * grid[1])
            case "pooling":
                return Pooling(grid)
            case "convolution":
                return SeparableConvolution(width, grid)
            case "attention":
                return Attention(width, width // self.config.head_width, bias=False)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.backbone(pixel_values)  # [B, T, C]
        return {"logits": self.head(self.head_norm(x.mean(1)))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


def _norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-6, bias=False)


_POOLFORMER = "Yu et al. 2021, MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418"
_BASELINES = "Yu et al. 2022, MetaFormer Baselines for Vision, arXiv 2210.13452"


def _entry(name: str, mixers: tuple[MixerName, ...], source: str, summary: str) -> Architecture:
    return Architecture(name, lambda: MetaFormer(MetaFormerConfig(mixers)), (source,), summary)


ARCHITECTURES = (
    _entry("identityformer", ("identity",) * 4, _BASELINES, "MetaFormer that mixes no tokens, 0.8 M parameters"),
    _entry(
        "randformer",
        ("identity", "identity", "random", "random"),
        _BASELINES,
        "MetaFormer with fixed random mixing in its last two stages, 0.8 M parameters",
    ),
    _entry("poolformer", ("pooling",) * 4, _POOLFORMER, "MetaFormer that averages neighbours, 0.8 M parameters"),
    _entry(
        "convformer",
        ("convolution",) * 4,
        _BASELINES,
        "MetaFormer with separable convolutions, 1 M parameters",
    ),
    _entry(
        "caformer",
        ("convolution", "convolution", "attention", "attention"),
        _BASELINES,
        "MetaFormer with separable convolutions, then attention, 1 M parameters",
    ),
)
