"""ConvMixer: patches mixed by large depthwise convolutions, channels by 1 x 1 convolutions.

Trockman and Kolter, "Patches Are All You Need?", arXiv 2201.09792: GELU, then batch norm, after each convolution; only
the depthwise one has a residual path.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "ConvMixer", "ConvMixerConfig"]


@dataclass(frozen=True)
class ConvMixerConfig:
    """A ConvMixer.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels.
        width: Channels.
        depth: Layers.
        kernel: Side of the depthwise convolution, odd.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 4
    width: int = 192
    depth: int = 6
    kernel: int = 5
    classes: int = 10


def activated(convolution: nn.Conv2d) -> nn.Sequential:
    """Follow a convolution by GELU and batch norm."""
    return nn.Sequential(convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels))


class MixerLayer(nn.Module):
    """``x + depthwise(x)``, then the pointwise convolution."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.space = activated(nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width))
        self.channels = activated(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same shape."""
        x = self.channels(x + self.space(x))
        return x


class ConvMixer(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = activated(nn.Conv2d(config.in_channels, config.width, config.patch, stride=config.patch))
        self.layers = nn.Sequential(*(MixerLayer(config.width, config.kernel) for _ in range(config.depth)))
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.layers(self.embedding(pixel_values))  # [B, C, H, W]
        return {"logits": self.head(x.mean((2, 3)))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Trockman and Kolter 2022, Patches Are All You Need?, arXiv 2201.09792",)

ARCHITECTURES = (
    Architecture(
        "convmixer", lambda: ConvMixer(ConvMixerConfig()), _SOURCES, "ConvMixer for 32 x 32 images, 0.3 M parameters"
    ),
)
