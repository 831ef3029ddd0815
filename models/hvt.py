"""HVT: a vision transformer that pools its tokens as it goes, without class token.

Pan et al., "Scalable Vision Transformers with Hierarchical Pooling", arXiv 2103.10619: before some blocks the sequence
is max-pooled (kernel 3, stride 2) and gets new learned positions; the classifier reads the mean of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xformopt.models.architecture import Architecture
from xformopt.models.blocks import Attention, Block, Mlp, PatchEmbedding, draw_weights, position_parameter
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Hvt", "HvtConfig"]

_KERNEL, _STRIDE = 3, 2


@dataclass(frozen=True)
class HvtConfig:
    """An HVT.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels.
        width: Channels of a token.
        depths: Blocks of each stage; tokens are pooled between stages.
        heads: Attention heads.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 4
    width: int = 128
    depths: tuple[int, ...] = (2, 1, 1)
    heads: int = 4
    classes: int = 10


class TokenPooling(nn.Module):
    """Max-pool the sequence, and tell the tokens where they now are."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = (tokens - _KERNEL) // _STRIDE + 1
        self.pool = nn.MaxPool1d(_KERNEL, _STRIDE)
        self.positions = position_parameter(self.tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, (T - 3) / 2 + 1, C]``."""
        x = self.pool(x.transpose(1, 2))
        return x.transpose(1, 2) + self.positions


class Hvt(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: HvtConfig) -> None:
        super().__init__()
        self.config = config
        width, tokens = config.width, (config.image_size // config.patch) ** 2
        self.embedding = PatchEmbedding(config.in_channels, width, config.patch)
        self.positions = position_parameter(tokens, width)
        layers: list[nn.Module] = []
        for stage, depth in enumerate(config.depths):
            if stage:
                pooling = TokenPooling(tokens, width)
                tokens = pooling.tokens
                layers.append(pooling)
            layers.extend(Block(width, Attention(width, config.heads), Mlp(width, 4 * width)) for _ in range(depth))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        draw_weights(self)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.layers(self.embedding(pixel_values) + self.positions)  # [B, T, C]
        return {"logits": self.head(self.norm(x).mean(1))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_SOURCES = ("Pan et al. 2021, Scalable Vision Transformers with Hierarchical Pooling, arXiv 2103.10619",)

ARCHITECTURES = (
    Architecture("hvt-tiny", lambda: Hvt(HvtConfig()), _SOURCES, "HVT for 32 x 32 images, 0.8 M parameters"),
)
