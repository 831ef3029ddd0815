"""Swin: attention inside windows, which every other block shifts by half a window.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030: a learned bias
by head and relative position in the window; the shift is cyclic, and a mask keeps parts apart that are no neighbours in
the image; between stages, 2 x 2 tokens are concatenated, normalized and projected to twice the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import (
    Attention,
    Block,
    Grid,
    Mlp,
    PatchEmbedding,
    draw_weights,
    from_windows,
    to_map,
    to_tokens,
    to_windows,
)
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Swin", "SwinConfig"]


@dataclass(frozen=True)
class SwinConfig:
    """A Swin; the tuples have one entry for each stage, each of which doubles the width and halves the grid.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels.
        width: Channels of the first stage.
        depths: Blocks.
        heads: Attention heads.
        window: Side of a window in tokens; a smaller grid is one window.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 2
    width: int = 48
    depths: tuple[int, ...] = (2, 2)
    heads: tuple[int, ...] = (2, 4)
    window: int = 4
    classes: int = 10


def relative_index(window: int) -> Tensor:
    """Return ``[T, T]``: for each pair of tokens of a window, the row of the bias table for their offset."""
    places = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # [T, 2]
    offsets = places[:, None] - places[None, :] + window - 1  # [T, T, 2], from 0 to 2 * window - 2
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]


def shift_mask(grid: Grid, window: int, shift: int) -> Tensor:
    """Return ``[windows, 1, T, T]``: 0 between tokens of one region of the shifted image, else far below."""
    bands = [torch.zeros(size, dtype=torch.int64) for size in grid]
    for band in bands:
        # the last window holds what was shifted in from the other side
        band[-window:] = 1
        band[-shift:] = 2
    regions = bands[0][:, None] * 3 + bands[1][None, :]
    regions = to_windows(regions.view(1, -1, 1), grid, (window, window)).squeeze(2)  # [windows, T]
    apart = regions[:, :, None] != regions[:, None, :]
    return apart[:, None].float() * -1e9


class WindowAttention(nn.Module):
    """Attention inside windows of the grid, which is first moved by ``shift`` rows and columns."""

    index: Tensor
    mask: Tensor | None

    def __init__(self, width: int, heads: int, grid: Grid, window: int, shift: int) -> None:
        super().__init__()
        self.grid, self.window, self.shift = grid, (window, window), shift
        self.attention = Attention(width, heads)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        self.register_buffer("index", relative_index(window))
        self.register_buffer("mask", shift_mask(grid, window, shift) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        batch = x.shape[0]
        bias = self.table[self.index].permute(2, 0, 1)[None]  # [1, heads, T, T]
        if self.mask is None:
            x = self.attention(to_windows(x, self.grid, self.window), bias)
            return from_windows(x, self.grid, self.window)
        bias = (bias + self.mask).expand(batch, -1, -1, -1, -1).flatten(0, 1)  # [B * windows, heads, T, T]
        x = self.attention(to_windows(self._roll(x, -self.shift), self.grid, self.window), bias)
        return self._roll(from_windows(x, self.grid, self.window), self.shift)

    def _roll(self, x: Tensor, by: int) -> Tensor:
        return to_tokens(to_map(x, self.grid).roll((by, by), (2, 3)))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to ``[B, H * W / 4, 2 * C]``."""
        x = to_tokens(functional.pixel_unshuffle(to_map(x, self.grid), 2))  # [B, H * W / 4, 4 * C]
        x = self.reduction(self.norm(x))
        return x


class Swin(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.patch
        layers: list[nn.Module] = [PatchEmbedding(config.in_channels, width, config.patch), nn.LayerNorm(width)]
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            if stage:
                layers.append(PatchMerging(width, (side, side)))
                width, side = 2 * width, side // 2
            layers.extend(self._block(width, heads, side, block) for block in range(depth))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        draw_weights(self)

    def _block(self, width: int, heads: int, side: int, block: int) -> Block:
        window = min(self.config.window, side)
        shift = window // 2 if block % 2 and side > window else 0
        return Block(width, WindowAttention(width, heads, (side, side), window, shift), Mlp(width, 4 * width))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.norm(self.layers(pixel_values))  # [B, T, C]
        return {"logits": self.head(x.mean(1))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Liu et al. 2021, Swin Transformer: Hierarchical Vision Transformer, arXiv 2103.14030",)

ARCHITECTURES = (
    Architecture("swin-micro", lambda: Swin(SwinConfig()), _SOURCES, "Swin for 32 x 32 images, 0.3 M parameters"),
    Architecture(
        "swin-tiny",
        lambda: Swin(
            SwinConfig(
                image_size=224, patch=4, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, classes=1000
            )
        ),
        _SOURCES,
        "Swin-T for 224 x 224 images, 28 M parameters",
    ),
)
