"""MLP-Mixer and gMLP: tokens mixed by linear layers along the sequence.

Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", arXiv 2105.01601: an MLP over the tokens, then one
over the channels, both on residual paths.  Liu et al., "Pay Attention to MLPs", arXiv 2105.08050 (gMLP): one MLP per
block, half of whose hidden channels, projected along the tokens, gate the other half; that projection starts near
zero with a bias of one, so that a fresh block is an ordinary MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Isotropic
from xformopt.models.blocks import Block, Mlp, PatchEmbedding, draw_weights
from xformopt.models.examples import example_images

__all__ = ["ARCHITECTURES", "Mixer", "MixerConfig"]


@dataclass(frozen=True)
class MixerConfig:
    """An MLP-Mixer or gMLP.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels.
        width: Channels of a token.
        depth: Blocks.
        token_hidden: Hidden width of the MLP over tokens (MLP-Mixer).
        mlp_ratio: Hidden width of the MLP over channels, over ``width``.
        form: ``mlp``: MLP-Mixer; ``gate``: gMLP.
        classes: Outputs.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 4
    width: int = 128
    depth: int = 4
    token_hidden: int = 64
    mlp_ratio: int = 4
    form: Literal["mlp", "gate"] = "mlp"
    classes: int = 10

    @property
    def tokens(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch) ** 2


class TokenMlp(nn.Module):
    """An MLP along the sequence, the same for each channel."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.mlp = Mlp(tokens, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        x = self.mlp(x.transpose(1, 2))
        return x.transpose(1, 2)


class GatedBlock(nn.Module):
    """``x + narrow(u * (W v + b))`` with u and v halves of ``gelu(widen(norm(x)))``, and W over the tokens."""

    def __init__(self, width: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.widen = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.gate_norm, self.along_tokens = nn.LayerNorm(hidden // 2), nn.Conv1d(tokens, tokens, 1)
        nn.init.normal_(self.along_tokens.weight, std=1e-2)
        nn.init.ones_(self.along_tokens.bias)  # type: ignore[arg-type]
        self.narrow = nn.Linear(hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        value, gate = functional.gelu(self.widen(self.norm(x))).chunk(2, -1)
        x = x + self.narrow(value * self.along_tokens(self.gate_norm(gate)))
        return x


class Mixer(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config.in_channels, config.width, config.patch)
        self.backbone = Isotropic((self._block() for _ in range(config.depth)), nn.LayerNorm(config.width))
        self.head = nn.Linear(config.width, config.classes)
        draw_weights(self)

    def _block(self) -> nn.Module:
        config, hidden = self.config, self.config.width * self.config.mlp_ratio
        if config.form == "gate":
            return GatedBlock(config.width, hidden, config.tokens)
        return Block(config.width, TokenMlp(config.tokens, config.token_hidden), Mlp(config.width, hidden))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        x = self.backbone(self.embedding(pixel_values))  # [B, T, C]
        return {"logits": self.head(x.mean(1))}

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


ARCHITECTURES = (
    Architecture(
        "mlp-mixer",
        lambda: Mixer(MixerConfig()),
        ("Tolstikhin et al. 2021, MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601",),
        "MLP-Mixer for 32 x 32 images, 0.6 M parameters",
    ),
    Architecture(
        "gmlp",
        lambda: Mixer(MixerConfig(form="gate")),
        ("Liu et al. 2021, Pay Attention to MLPs, arXiv 2105.08050",),
        "gMLP for 32 x 32 images, 0.4 M parameters",
    ),
)
