"""CvT: convolutions where a vision transformer has linear layers and positions.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers", arXiv 2103.15808: a pyramid whose stages begin with
an overlapping convolutional embedding; queries, keys and values come from depthwise 3 x 3 convolutions with batch norm
before their linear layers, with stride 2 for keys and values; no position embeddings.  The class token of the last
stage passes these convolutions by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import OverlapEmbedding
from xformopt.models.blocks import (
    Block,
    Grid,
    Mlp,
    conv_norm,
    draw_weights,
    merge_heads,
    position_parameter,
    split_heads,
    to_map,
    to_tokens,
)
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Cvt", "CvtConfig"]


@dataclass(frozen=True)
class CvtConfig:
    """A CvT; the tuples have one entry for each stage.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        widths: Channels.
        depths: Blocks.
        heads: Attention heads.
        classes: Outputs.

    """

    image_size: int = 64
    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 3)
    heads: tuple[int, ...] = (1, 2, 4)
    classes: int = 10


class ConvolutionalAttention(nn.Module):
    """Attention whose projections see their 3 x 3 neighbours; ``prefix`` tokens in front of the map do not."""

    def __init__(self, width: int, heads: int, grid: Grid, prefix: int) -> None:
        super().__init__()
        self.heads, self.grid, self.prefix = heads, grid, prefix
        self.neighbours = nn.ModuleDict(
            {
                name: conv_norm(width, width, 3, stride, padding=1, groups=width)
                for name, stride in (("query", 1), ("key", 2), ("value", 2))
            }
        )
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, prefix + H * W, C]`` to the same shape."""
        prefix, image = x[:, : self.prefix], to_map(x[:, self.prefix :], self.grid)
        q, k, v = (
            torch.cat([prefix, to_tokens(self.neighbours[name](image))], 1) for name in ("query", "key", "value")
        )
        q, k, v = (
            split_heads(linear(tokens), self.heads)  # [B, H, T or S, D]
            for linear, tokens in ((self.query, q), (self.key, k), (self.value, v))
        )
        # the authors scale by the width of all heads together
        x = functional.scaled_dot_product_attention(q, k, v, scale=self.output.in_features**-0.5)
        x = self.output(merge_heads(x))
        return x


class Cvt(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings, self.stages = nn.ModuleList(), nn.ModuleList()
        self.grids: list[Grid] = []
        channels, grid, last = config.in_channels, (config.image_size, config.image_size), len(config.widths) - 1
        for stage, (width, depth, heads) in enumerate(zip(config.widths, config.depths, config.heads, strict=True)):
            kernel, stride = (7, 4) if stage == 0 else (3, 2)
            embedding = OverlapEmbedding(channels, width, kernel, stride, grid)
            channels, grid = width, embedding.grid
            self.embeddings.append(embedding)
            self.grids.append(grid)
            mixers = (ConvolutionalAttention(width, heads, grid, prefix=int(stage == last)) for _ in range(depth))
            self.stages.append(nn.Sequential(*(Block(width, mixer, Mlp(width, 4 * width)) for mixer in mixers)))
        self.token = position_parameter(1, channels)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, config.classes)
        draw_weights(self)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        image = pixel_values
        for embedding, stage, grid in zip(self.embeddings[:-1], self.stages[:-1], self.grids[:-1], strict=True):
            image = to_map(stage(embedding(image)), grid)
        x = self.embeddings[-1](image)  # [B, T, C]
        x = self.stages[-1](torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        return {"logits": self.head(self.norm(x)[:, 0])}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Wu et al. 2021, CvT: Introducing Convolutions to Vision Transformers, arXiv 2103.15808",)

ARCHITECTURES = (
    Architecture("cvt-tiny", lambda: Cvt(CvtConfig()), _SOURCES, "CvT for 64 x 64 images, 0.8 M parameters"),
    Architecture(
        "cvt-13",
        lambda: Cvt(CvtConfig(image_size=224, widths=(64, 192, 384), depths=(1, 2, 10), heads=(1, 3, 6), classes=1000)),
        _SOURCES,
        "CvT-13 for 224 x 224 images, 20 M parameters",
    ),
)
