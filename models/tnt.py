"""TNT: a small transformer on the pixels of each patch inside the transformer on patches.

Han et al., "Transformer in Transformer", arXiv 2103.00112: a patch ("sentence") is cut into sub-patches ("words"); each
block mixes the words of every patch among themselves, adds a projection of all of them to the patch's token, and then
mixes the patches.  Words and patches have positions of their own; the class token has no words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Block, Mlp, draw_weights, position_parameter, to_tokens
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Tnt", "TntConfig"]


@dataclass(frozen=True)
class TntConfig:
    """A TNT.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels.
        word_stride: Pixels between words, of which a patch has ``(patch / word_stride)^2``.
        word_kernel: Side of the convolution that makes words from pixels.
        inner_width: Channels of a word.
        inner_heads: Attention heads among words.
        width: Channels of a patch's token.
        heads: Attention heads among patches.
        depth: Blocks.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 8
    word_stride: int = 2
    word_kernel: int = 3
    inner_width: int = 24
    inner_heads: int = 4
    width: int = 96
    heads: int = 3
    depth: int = 3
    classes: int = 10

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch) ** 2

    @property
    def words(self) -> int:
        """How many words a patch has."""
        return (self.patch // self.word_stride) ** 2


class TntBlock(nn.Module):
    """Inner block, projection of the words into their patch, outer block."""

    def __init__(self, config: TntConfig) -> None:
        super().__init__()
        inner, width = config.inner_width, config.width
        self.inner = Block(inner, Attention(inner, config.inner_heads), Mlp(inner, 4 * inner))
        self.join = nn.Sequential(nn.LayerNorm(config.words * inner), nn.Linear(config.words * inner, width))
        self.outer = Block(width, Attention(width, config.heads), Mlp(width, 4 * width))
        self.patches = config.patches

    def forward(self, words: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Update the words ``[B * N, M, c]`` and the class token with the patches, ``[B, 1 + N, C]``."""
        words = self.inner(words)
        joined = self.join(words.flatten(1)).unflatten(0, (-1, self.patches))  # [B, N, C]
        x = torch.cat([x[:, :1], x[:, 1:] + joined], 1)
        return words, self.outer(x)


class Tnt(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: TntConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Conv2d(
            config.in_channels,
            config.inner_width,
            config.word_kernel,
            stride=config.word_stride,
            padding=config.word_kernel // 2,
        )
        self.word_positions = position_parameter(config.words, config.inner_width)
        size = config.words * config.inner_width
        self.join = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.width), nn.LayerNorm(config.width))
        self.token = position_parameter(1, config.width)
        self.positions = position_parameter(1 + config.patches, config.width)
        self.blocks = nn.ModuleList(TntBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        draw_weights(self)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        words = self._words(pixel_values) + self.word_positions  # [B * N, M, c]
        patches = self.join(words.flatten(1)).unflatten(0, (-1, self.config.patches))  # [B, N, C]
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.positions
        for block in self.blocks:
            words, x = block(words, x)
        return {"logits": self.head(self.norm(x[:, 0]))}

    def _words(self, image: Tensor) -> Tensor:
        """Return the words of every patch, ``[B * N, M, c]``."""
        words_of_side = self.config.patch // self.config.word_stride
        # every patch's words become channels: [B, c * M, rows, columns]
        x = functional.pixel_unshuffle(self.words(image), words_of_side)
        x = to_tokens(x).flatten(0, 1)  # [B * N, c * M]
        words: Tensor = x.unflatten(1, (self.config.inner_width, self.config.words)).transpose(1, 2)
        return words

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Han et al. 2021, Transformer in Transformer, arXiv 2103.00112",)

ARCHITECTURES = (
    Architecture("tnt-tiny", lambda: Tnt(TntConfig()), _SOURCES, "TNT for 32 x 32 images, 0.5 M parameters"),
    Architecture(
        "tnt-small",
        lambda: Tnt(
            TntConfig(
                image_size=224, patch=16, word_stride=4, word_kernel=7, width=384, heads=6, depth=12, classes=1000
            )
        ),
        _SOURCES,
        "TNT-S for 224 x 224 images, 24 M parameters",
    ),
)
