"""SHViT: attention with a single head on a part of the channels.

Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456: a stem that
shrinks the image early, and blocks of a depthwise 3 x 3 convolution, single-head attention on some channels (the others
pass by and meet them again in the projection), and an MLP of 1 x 1 convolutions, each on a residual path.  The first
stage has no attention.  All convolutions carry batch norms, which inference folds away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import conv_norm, draw_weights, to_tokens
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Shvit", "ShvitConfig"]


@dataclass(frozen=True)
class ShvitConfig:
    """An SHViT; the tuples have one entry for each stage.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        stem: Strided convolutions of the stem, each halving the map.
        widths: Channels.
        depths: Blocks.
        attended: Channels that attention mixes; 0: none.
        key_width: Channels of queries and of keys.
        classes: Outputs.

    """

    image_size: int = 64
    in_channels: int = 3
    stem: int = 2
    widths: tuple[int, ...] = (64, 112, 160)
    depths: tuple[int, ...] = (1, 2, 2)
    attended: tuple[int, ...] = (0, 24, 32)
    key_width: int = 16
    classes: int = 10


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        x = x + self.inner(x)
        return x


class SingleHeadAttention(nn.Module):
    """Attention of the first ``attended`` channels of a map; a projection mixes them with the rest."""

    def __init__(self, width: int, attended: int, key_width: int) -> None:
        super().__init__()
        self.sizes = [attended, width - attended]
        self.parts = [key_width, key_width, attended]
        self.norm = nn.GroupNorm(1, attended)
        self.qkv = conv_norm(attended, sum(self.parts))
        self.output = nn.Sequential(nn.ReLU(), conv_norm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        mixed, rest = x.split(self.sizes, 1)
        tokens = to_tokens(self.qkv(self.norm(mixed)))  # [B, T, 2 * key_width + attended]
        q, k, v = (part.unsqueeze(1) for part in tokens.split(self.parts, -1))  # [B, 1, T, D]
        attended = functional.scaled_dot_product_attention(q, k, v).squeeze(1)  # [B, T, attended]
        mixed = attended.transpose(1, 2).unflatten(2, x.shape[2:])
        x = self.output(torch.cat([mixed, rest], 1))
        return x


class SqueezeExcitation(nn.Module):
    """Scale channels by a gate computed from their means (Hu et al., arXiv 1709.01507)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        gate = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * gate.sigmoid()
        return x


def feed_forward(width: int) -> Residual:
    """Return the MLP of 1 x 1 convolutions, which doubles the width."""
    return Residual(nn.Sequential(conv_norm(width, 2 * width), nn.ReLU(), conv_norm(2 * width, width)))


def depthwise(width: int) -> Residual:
    """Return the depthwise 3 x 3 convolution."""
    return Residual(conv_norm(width, width, 3, padding=1, groups=width))


def block(width: int, attended: int, key_width: int) -> nn.Sequential:
    """Return convolution, attention (if ``attended``) and MLP."""
    attention: Iterable[nn.Module] = [Residual(SingleHeadAttention(width, attended, key_width))] if attended else []
    return nn.Sequential(depthwise(width), *attention, feed_forward(width))


def downsampling(width_in: int, width: int) -> nn.Sequential:
    """Return the change of stage: an inverted bottleneck of stride 2 with a gate, between two residual parts."""
    hidden = 4 * width_in
    bottleneck = nn.Sequential(
        conv_norm(width_in, hidden),
        nn.ReLU(),
        conv_norm(hidden, hidden, 3, stride=2, padding=1, groups=hidden),
        nn.ReLU(),
        SqueezeExcitation(hidden, hidden // 4),
        conv_norm(hidden, width),
    )
    return nn.Sequential(depthwise(width_in), feed_forward(width_in), bottleneck, depthwise(width), feed_forward(width))


class Shvit(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: ShvitConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = config.in_channels
        for step in reversed(range(config.stem)):
            width = config.widths[0] >> step
            layers += [conv_norm(channels, width, 3, stride=2, padding=1), nn.ReLU()]
            channels = width
        layers.pop()  # nothing stands between the stem's last convolution and the first block
        for width, depth, attended in zip(config.widths, config.depths, config.attended, strict=True):
            if width != channels:
                layers.append(downsampling(channels, width))
            channels = width
            layers.extend(block(width, attended, config.key_width) for _ in range(depth))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.BatchNorm1d(channels), nn.Linear(channels, config.classes))
        draw_weights(self)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.layers(pixel_values)  # [B, C, H, W]
        return {"logits": self.head(x.mean((2, 3)))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Yun and Ro 2024, SHViT: Single-Head Vision Transformer, arXiv 2401.16456",)

ARCHITECTURES = (
    Architecture("shvit-micro", lambda: Shvit(ShvitConfig()), _SOURCES, "SHViT for 64 x 64 images, 1 M parameters"),
    Architecture(
        "shvit-s1",
        lambda: Shvit(
            ShvitConfig(
                image_size=224,
                stem=4,
                widths=(128, 224, 320),
                depths=(2, 4, 5),
                attended=(0, 48, 68),
                classes=1000,
            )
        ),
        _SOURCES,
        "SHViT-S1 for 224 x 224 images, 6 M parameters",
    ),
)
