"""PVT v2: a pyramid whose attention looks at a coarser copy of the map.

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv 2106.13797: overlapping patch
embeddings, spatial-reduction attention (keys and values from a map shrunk by a strided convolution, or, in the linear
form, by average pooling to 7 x 7), and a depthwise convolution inside the MLP in place of position embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Pyramid
from xformopt.models.blocks import Attention, Block, DepthwiseMlp, Grid, draw_weights, to_map, to_tokens
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Pvt", "PvtConfig"]


@dataclass(frozen=True)
class PvtConfig:
    """A PVT v2; the tuples have one entry for each stage.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        widths: Channels.
        depths: Blocks.
        heads: Attention heads.
        mlp_ratios: Hidden width of the MLP over the width.
        reductions: By how much keys and values are shrunk along each side; 1: not at all.
        pooled: Side of the average-pooled map of the linear form; None: the convolutional form.
        classes: Outputs.

    """

    image_size: int = 64
    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128, 160)
    depths: tuple[int, ...] = (1, 1, 2, 1)
    heads: tuple[int, ...] = (1, 2, 4, 5)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    pooled: int | None = None
    classes: int = 10


class ReducedAttention(nn.Module):
    """Attention of all tokens to a shrunken map of themselves."""

    def __init__(self, width: int, heads: int, reduction: int, pooled: int | None, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.attention = Attention(width, heads)
        self.reduce: nn.Module | None = None
        if pooled is not None:
            # 1 x 1 after pooling, and a GELU after the norm, as the linear form has them
            self.reduce = nn.Sequential(nn.AdaptiveAvgPool2d(min(pooled, *grid)), nn.Conv2d(width, width, 1))
            self.activation: nn.Module = nn.GELU()
        elif reduction > 1:
            self.reduce = nn.Conv2d(width, width, reduction, stride=reduction)
            self.activation = nn.Identity()
        if self.reduce is not None:
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H * W, C]`` to the same shape."""
        if self.reduce is None:
            x = self.attention(x)
            return x
        context = self.norm(to_tokens(self.reduce(to_map(x, self.grid))))  # [B, H * W / r^2, C]
        x = self.attention(x, None, self.activation(context))
        return x


class Pvt(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: PvtConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Pyramid(config.in_channels, config.image_size, config.widths, config.depths, self._block)
        self.head = nn.Linear(config.widths[-1], config.classes)
        draw_weights(self)

    def _block(self, stage: int, grid: Grid) -> Block:
        config, width = self.config, self.config.widths[stage]
        mixer = ReducedAttention(width, config.heads[stage], config.reductions[stage], config.pooled, grid)
        return Block(width, mixer, DepthwiseMlp(width, width * config.mlp_ratios[stage], grid))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.backbone(pixel_values)  # [B, T, C]
        return {"logits": self.head(x.mean(1))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Wang et al. 2021, PVT v2: Improved Baselines with Pyramid Vision Transformer, arXiv 2106.13797",)

ARCHITECTURES = (
    Architecture("pvt-tiny", lambda: Pvt(PvtConfig()), _SOURCES, "PVT v2 for 64 x 64 images, 1.4 M parameters"),
    Architecture(
        "pvt-linear",
        lambda: Pvt(PvtConfig(pooled=2)),
        _SOURCES,
        "PVT v2 with pooled keys (linear attention in the authors' words) for 64 x 64 images, 1.2 M parameters",
    ),
    Architecture(
        "pvt-v2-b0",
        lambda: Pvt(
            PvtConfig(image_size=224, widths=(32, 64, 160, 256), depths=(2, 2, 2, 2), heads=(1, 2, 5, 8), classes=1000)
        ),
        _SOURCES,
        "PVT v2-B0 for 224 x 224 images, 3.7 M parameters",
    ),
)
