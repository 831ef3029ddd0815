"""CrossViT: two vision transformers on patches of two sizes, which exchange their class tokens.

Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", arXiv 2103.14899:
after some blocks, the class token of each branch, brought to the other's width, attends to the other's patches and
returns; the logits of both class tokens are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Block, Mlp, PatchEmbedding, draw_weights, position_parameter
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "CrossVit", "CrossVitConfig"]


@dataclass(frozen=True)
class CrossVitConfig:
    """A CrossViT; the pairs are (branch of small patches, branch of large patches).

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patches: Side of a patch in pixels.
        widths: Channels of a token.
        depths: Blocks of each branch between two exchanges.
        exchanges: How often class tokens are exchanged.
        heads: Attention heads, everywhere.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patches: tuple[int, int] = (4, 8)
    widths: tuple[int, int] = (64, 96)
    depths: tuple[int, int] = (1, 2)
    exchanges: int = 2
    heads: int = 4
    classes: int = 10


class Translation(nn.Sequential):
    """A class token from one branch's width to the other's."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(nn.LayerNorm(width_in), nn.GELU(), nn.Linear(width_in, width))


class Exchange(nn.Module):
    """The class token of one branch reads the patches of the other."""

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.leave, self.come_back = Translation(width, other), Translation(other, width)
        self.norm, self.attention = nn.LayerNorm(other), Attention(other, heads)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """Update ``token`` ``[B, 1, width]`` from ``patches`` ``[B, T, other]``."""
        guest = self.leave(token)
        context = self.norm(torch.cat([guest, patches], 1))
        token = self.come_back(guest + self.attention(context[:, :1], None, context))
        return token


class MultiScaleBlock(nn.Module):
    """Each branch by itself, then the exchange."""

    def __init__(self, config: CrossVitConfig) -> None:
        super().__init__()
        small, large = config.widths
        self.branches = nn.ModuleList(
            nn.Sequential(*(Block(width, Attention(width, config.heads), Mlp(width, 4 * width)) for _ in range(depth)))
            for width, depth in zip(config.widths, config.depths, strict=True)
        )
        self.to_large = Exchange(small, large, config.heads)
        self.to_small = Exchange(large, small, config.heads)

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        """Two sequences with class tokens in front to the same shapes."""
        small, large = (branch(x) for branch, x in zip(self.branches, (small, large), strict=True))
        small_token = self.to_large(small[:, :1], large[:, 1:])
        large_token = self.to_small(large[:, :1], small[:, 1:])
        return torch.cat([small_token, small[:, 1:]], 1), torch.cat([large_token, large[:, 1:]], 1)


class Branch(nn.Module):
    """What a branch begins with: patches, class token, positions."""

    def __init__(self, config: CrossVitConfig, width: int, patch: int) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(config.in_channels, width, patch)
        self.token = position_parameter(1, width)
        self.positions = position_parameter(1 + (config.image_size // patch) ** 2, width)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, 1 + T, width]``."""
        x = self.embedding(image)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions


class CrossVit(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: CrossVitConfig) -> None:
        super().__init__()
        self.config = config
        self.small, self.large = (
            Branch(config, width, patch) for width, patch in zip(config.widths, config.patches, strict=True)
        )
        self.blocks = nn.ModuleList(MultiScaleBlock(config) for _ in range(config.exchanges))
        self.small_head, self.large_head = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.classes)) for width in config.widths
        )
        draw_weights(self)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        small, large = self.small(pixel_values), self.large(pixel_values)
        for block in self.blocks:
            small, large = block(small, large)
        return {"logits": (self.small_head(small[:, 0]) + self.large_head(large[:, 0])) / 2}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


ARCHITECTURES = (
    Architecture(
        "crossvit-micro",
        lambda: CrossVit(CrossVitConfig()),
        ("Chen et al. 2021, CrossViT: Cross-Attention Multi-Scale Vision Transformer, arXiv 2103.14899",),
        "CrossViT for 32 x 32 images, 0.7 M parameters",
    ),
)
