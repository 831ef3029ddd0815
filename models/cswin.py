"""CSWin: half of the heads attend inside horizontal stripes, half inside vertical ones, which together form a cross.

Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", arXiv 2107.00652: the
stripes widen from stage to stage, the last stage is full attention; the position is told by a depthwise 3 x 3
convolution of the values inside each stripe, added to the result ("locally-enhanced positional encoding").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Pyramid
from xformopt.models.blocks import (
    Block,
    Grid,
    Mlp,
    draw_weights,
    from_windows,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
    to_windows,
)
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "CSWin", "CSWinConfig"]


@dataclass(frozen=True)
class CSWinConfig:
    """A CSWin; the tuples have one entry for each stage.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        widths: Channels.
        depths: Blocks.
        heads: Attention heads; even where there are two directions.
        stripes: Width of a stripe in tokens; the whole side means full attention.
        classes: Outputs.

    """

    image_size: int = 64
    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (1, 2, 1)
    heads: tuple[int, ...] = (2, 4, 8)
    stripes: tuple[int, ...] = (1, 2, 4)
    classes: int = 10


class StripeAttention(nn.Module):
    """Attention inside windows, plus the depthwise convolution of the values."""

    def __init__(self, width: int, heads: int, grid: Grid, window: Grid) -> None:
        super().__init__()
        self.heads, self.grid, self.window = heads, grid, window
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three ``[B, H * W, C]`` to one."""
        q, k, v = (to_windows(x, self.grid, self.window) for x in (q, k, v))  # [B * windows, h * w, C]
        position = to_tokens(self.position(to_map(v, self.window)))
        q, k, v = (split_heads(x, self.heads) for x in (q, k, v))
        x = merge_heads(functional.scaled_dot_product_attention(q, k, v)) + position
        return from_windows(x, self.grid, self.window)


class CrossShapedAttention(nn.Module):
    """Channels are shared out between the directions: horizontal and vertical stripes, or the whole map."""

    def __init__(self, width: int, heads: int, grid: Grid, stripe: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        windows = [grid] if stripe >= grid[0] else [(stripe, grid[1]), (grid[0], stripe)]
        self.directions = nn.ModuleList(
            StripeAttention(width // len(windows), heads // len(windows), grid, window) for window in windows
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        q, k, v = (part.chunk(len(self.directions), -1) for part in self.qkv(x).chunk(3, -1))
        mixed = [direction(*parts) for direction, *parts in zip(self.directions, q, k, v, strict=True)]
        x = self.output(torch.cat(mixed, -1))
        return x


class CSWin(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: CSWinConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Pyramid(config.in_channels, config.image_size, config.widths, config.depths, self._block)
        self.head = nn.Linear(config.widths[-1], config.classes)
        draw_weights(self)

    def _block(self, stage: int, grid: Grid) -> Block:
        width, config = self.config.widths[stage], self.config
        mixer = CrossShapedAttention(width, config.heads[stage], grid, config.stripes[stage])
        return Block(width, mixer, Mlp(width, 4 * width))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.backbone(pixel_values)  # [B, T, C]
        return {"logits": self.head(x.mean(1))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


ARCHITECTURES = (
    Architecture(
        "cswin-micro",
        lambda: CSWin(CSWinConfig()),
        ("Dong et al. 2021, CSWin Transformer: Cross-Shaped Windows, arXiv 2107.00652",),
        "CSWin for 64 x 64 images, 0.4 M parameters",
    ),
)
