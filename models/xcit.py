"""XCiT: attention between channels instead of tokens.

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", arXiv 2106.09681: with queries and keys normalized along
the tokens, ``softmax(temperature * k^T q)`` is a ``[D, D]`` matrix per head, so the cost is linear in the tokens.
Tokens meet in a local patch interaction (two depthwise 3 x 3 convolutions); two class-attention layers end the network.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xformopt.kernels.definition import xf
from xformopt.models.architecture import Architecture
from xformopt.models.blocks import (
    Attention,
    Grid,
    Mlp,
    conv_norm,
    draw_weights,
    position_parameter,
    sinusoids,
    to_map,
    to_tokens,
)
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "CrossCovarianceAttention", "Xcit", "XcitConfig"]

_POSITION_WIDTH = 32


@dataclass(frozen=True)
class XcitConfig:
    """An XCiT.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels, a power of two.
        width: Channels of a token.
        depth: Blocks between channels.
        class_depth: Class-attention blocks.
        heads: Heads of both.
        layer_scale: Initial factor of the residual paths; 1e-5 where deep networks are trained.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 4
    width: int = 96
    depth: int = 3
    class_depth: int = 2
    heads: int = 4
    layer_scale: float = 1.0
    classes: int = 10


class CrossCovarianceAttention(nn.Module):
    """Each channel of a head becomes a mixture of that head's channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        q, k, v = self.qkv(x).chunk(3, -1)  # each [B, T, C]
        x = self.output(xf.xca(q, k, v, self.temperature.flatten(), heads=self.heads))
        return x


class LocalPatchInteraction(nn.Module):
    """Depthwise 3 x 3 convolution, GELU, batch norm, depthwise 3 x 3 convolution."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.GELU(),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        return to_tokens(self.layers(to_map(x, self.grid)))


class XcitBlock(nn.Module):
    """Channels attend, neighbours interact, the MLP: each normalized before and scaled after, on a residual path."""

    def __init__(self, width: int, heads: int, grid: Grid, layer_scale: float) -> None:
        super().__init__()
        parts = (CrossCovarianceAttention(width, heads), LocalPatchInteraction(width, grid), Mlp(width, 4 * width))
        self.parts = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), part) for part in parts)
        self.scales = nn.ParameterList(torch.full((width,), layer_scale) for _ in parts)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        for part, scale in zip(self.parts, self.scales, strict=True):
            x = x + scale * part(x)
        return x


class ClassAttentionBlock(nn.Module):
    """Only the class token is updated, from itself and all patches (CaiT, Touvron et al., arXiv 2103.17239)."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width))
        self.attention_scale = nn.Parameter(torch.full((width,), layer_scale))
        self.mlp_scale = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, token: Tensor, x: Tensor) -> Tensor:
        """Update the class token ``[B, 1, C]`` from the patches ``[B, T, C]``."""
        context = self.attention_norm(torch.cat([token, x], 1))
        token = token + self.attention_scale * self.attention(context[:, :1], None, context)
        token = token + self.mlp_scale * self.mlp(token)
        return token


def fourier_positions(grid: Grid) -> Tensor:
    """Return ``[1, H * W, 2 * _POSITION_WIDTH]``: sinusoids of the row and of the column, both from 0 to 2 pi."""
    rows, columns = (torch.arange(1, size + 1) * (2 * math.pi / size) for size in grid)
    places = torch.cartesian_prod(rows, columns)  # [H * W, 2]
    return sinusoids(places, _POSITION_WIDTH).flatten(1)[None]


class Xcit(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    places: Tensor

    def __init__(self, config: XcitConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.patch
        self.embedding = self._embedding()
        self.register_buffer("places", fourier_positions((side, side)))
        self.positions = nn.Linear(2 * _POSITION_WIDTH, width)
        self.blocks = nn.Sequential(
            *(XcitBlock(width, config.heads, (side, side), config.layer_scale) for _ in range(config.depth))
        )
        self.token = position_parameter(1, width)
        self.class_blocks = nn.ModuleList(
            ClassAttentionBlock(width, config.heads, config.layer_scale) for _ in range(config.class_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        draw_weights(self)

    def _embedding(self) -> nn.Sequential:
        """Return strided 3 x 3 convolutions with batch norm, and GELU between them, that halve the map to patches."""
        steps = self.config.patch.bit_length() - 1
        widths = [self.config.in_channels, *(self.config.width >> step for step in reversed(range(steps)))]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [conv_norm(before, after, 3, stride=2, padding=1), nn.GELU()]
        return nn.Sequential(*layers[:-1])

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = to_tokens(self.embedding(pixel_values)) + self.positions(self.places)  # [B, T, C]
        x = self.blocks(x)
        token = self.token.expand(x.shape[0], -1, -1)
        for block in self.class_blocks:
            token = block(token, x)
        return {"logits": self.head(self.norm(token[:, 0]))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


ARCHITECTURES = (
    Architecture(
        "xcit-nano",
        lambda: Xcit(XcitConfig()),
        ("El-Nouby et al. 2021, XCiT: Cross-Covariance Image Transformers, arXiv 2106.09681",),
        "XCiT for 32 x 32 images, 0.6 M parameters",
    ),
)
