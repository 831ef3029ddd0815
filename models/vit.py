"""ViT and its near relatives: DeiT, parallel blocks, and norms on both sides of the patch embedding.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929: patches become tokens, a class token is put in
front, learned positions are added, and pre-norm transformer blocks follow.  Variants:

- DeiT (Touvron et al., arXiv 2012.12877): a distillation token beside the class token with a classifier of its own,
  trained on a teacher's labels; at inference the two classifiers are averaged.
- Parallel (Touvron et al., "Three things everyone should know about Vision Transformers", arXiv 2203.09795):
  ``x + attn_1(x) + attn_2(x)``, then ``x + mlp_1(x) + mlp_2(x)``, each branch with its own norm.
- Joined (Zhou et al., "Rethinking Vision Transformer Depth via Structural Reparameterization", arXiv 2511.19718):
  parallel branches that training joins at their nonlinearities; see ``joined.py``.
- Dual PatchNorm (Kumar et al., arXiv 2302.01327): LayerNorm on the raw patches and again on their embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xformopt.models.architecture import Architecture
from xformopt.models.backbone import Isotropic
from xformopt.models.blocks import Attention, Block, Mlp, PatchEmbedding, draw_weights, position_parameter
from xformopt.models.examples import example_images
from xformopt.models.joined import JoinedBlock

__all__ = ["ARCHITECTURES", "ViT", "ViTConfig"]


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer.

    Attributes:
        image_size: Side of the image in pixels.
        in_channels: Its channels.
        patch: Side of a patch in pixels.
        width: Channels of a token.
        depth: Blocks; with ``branches`` above 1 each counts once.
        heads: Attention heads.
        classes: Outputs.
        pool: What the classifier reads: the class ``token``, or the ``mean`` of the patches (no class token then).
        mlp_ratio: Hidden width of the MLP over ``width``.
        distillation: Whether there is a distillation token (needs ``pool="token"``).
        branches: Parallel attention, and parallel MLP, branches of a block.
        joined: Whether the branches of a block are joined at their nonlinearities.
        patch_norm: Whether patches are normalized before and after their embedding.

    """

    image_size: int = 32
    in_channels: int = 3
    patch: int = 4
    width: int = 128
    depth: int = 4
    heads: int = 4
    classes: int = 10
    pool: Literal["token", "mean"] = "token"
    mlp_ratio: float = 4.0
    distillation: bool = False
    branches: int = 1
    joined: bool = False
    patch_norm: bool = False

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch) ** 2

    @property
    def prefix(self) -> int:
        """How many tokens stand in front of the patches."""
        return (1 + self.distillation) * (self.pool == "token")


class NormalizedPatchEmbedding(nn.Module):
    """LayerNorm on the pixels of each patch, a linear layer, and LayerNorm on the result (Dual PatchNorm)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.before = nn.LayerNorm(channels * patch**2)
        self.projection = nn.Linear(channels * patch**2, width)
        self.after = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, T, width]``."""
        pixels = functional.pixel_unshuffle(image, self.patch).flatten(2).transpose(1, 2)  # [B, T, C * p * p]
        tokens: Tensor = self.after(self.projection(self.before(pixels)))
        return tokens


class ParallelBlock(nn.Module):
    """Attention branches side by side, then MLP branches side by side; the order of sum and depth is exchanged."""

    def __init__(self, width: int, heads: int, hidden: int, branches: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), Attention(width, heads)) for _ in range(branches)
        )
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Mlp(width, hidden)) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to the same shape."""
        for branches in (self.attentions, self.mlps):
            x = x + torch.stack([branch(x) for branch in branches]).sum(0)
        return x


class ViT(nn.Module):
    """Image classifier: ``pixel_values`` ``[B, C, H, W]`` to ``logits`` ``[B, classes]``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        embedding = NormalizedPatchEmbedding if config.patch_norm else PatchEmbedding
        self.embedding = embedding(config.in_channels, width, config.patch)
        self.prefix = position_parameter(config.prefix, width) if config.prefix else None
        self.positions = position_parameter(config.prefix + config.patches, width)
        if config.branches > 1:
            kind = JoinedBlock if config.joined else ParallelBlock
            blocks: list[nn.Module] = [kind(width, config.heads, hidden, config.branches) for _ in range(config.depth)]
        else:
            blocks = [Block(width, Attention(width, config.heads), Mlp(width, hidden)) for _ in range(config.depth)]
        self.backbone = Isotropic(blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, config.classes)
        self.distillation_head = nn.Linear(width, config.classes) if config.distillation else None
        draw_weights(self)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return ``{"logits": [B, classes]}``."""
        logits, *distilled = self.answers(pixel_values)
        if distilled:
            logits = (logits + distilled[0]) / 2
        return {"logits": logits}

    def answers(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the logits ``[B, classes]`` of each classifier: the class token's, then the distillation token's if it
        has one.  Training has a loss for each.
        """
        x = self.embedding(pixel_values)  # [B, T, C]
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        x = self.backbone(x + self.positions)
        logits: Tensor = self.head(x[:, 0] if self.prefix is not None else x.mean(1))
        return (logits,) if self.distillation_head is None else (logits, self.distillation_head(x[:, 1]))

    def example_inputs(self) -> dict[str, Tensor]:
        """Return two images."""
        return {"pixel_values": example_images(self.config.in_channels, self.config.image_size)}


_VIT = "Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv 2010.11929"
_DEIT = "Touvron et al. 2020, Training data-efficient image transformers, arXiv 2012.12877"
_THREE_THINGS = "Touvron et al. 2022, Three things everyone should know about Vision Transformers, arXiv 2203.09795"
_JOINED = "Zhou et al. 2025, Rethinking Vision Transformer Depth via Structural Reparameterization, arXiv 2511.19718"
_DUAL = "Kumar et al. 2023, Dual PatchNorm, arXiv 2302.01327"

ARCHITECTURES = (
    Architecture("vit-tiny", lambda: ViT(ViTConfig()), (_VIT,), "ViT for 32 x 32 images, 0.8 M parameters"),
    Architecture(
        "vit-base",
        lambda: ViT(ViTConfig(image_size=224, patch=16, classes=1000, width=768, depth=12, heads=12)),
        (_VIT,),
        "ViT-B/16 for 224 x 224 images, 86 M parameters",
    ),
    Architecture(
        "deit-tiny",
        lambda: ViT(ViTConfig(distillation=True)),
        (_DEIT,),
        "DeiT with a distillation token for 32 x 32 images, 0.8 M parameters",
    ),
    Architecture(
        "deit-small",
        lambda: ViT(ViTConfig(image_size=224, patch=16, classes=1000, width=384, depth=12, heads=6)),
        (_DEIT, _VIT),
        "DeiT-S/16 without distillation token for 224 x 224 images, 22 M parameters",
    ),
    Architecture(
        "deit-small-distilled",
        lambda: ViT(ViTConfig(image_size=224, patch=16, classes=1000, width=384, depth=12, heads=6, distillation=True)),
        (_DEIT,),
        "DeiT-S/16 with a distillation token for 224 x 224 images, 22 M parameters",
    ),
    Architecture(
        "vit-parallel",
        lambda: ViT(ViTConfig(branches=2, depth=2)),
        (_THREE_THINGS, _VIT),
        "ViT with two attention and two MLP branches a block, 0.8 M parameters",
    ),
    Architecture(
        "vit-joined",
        lambda: ViT(ViTConfig(branches=2, depth=2, joined=True)),
        (_JOINED, _VIT),
        "ViT with two attention and two MLP branches a block, joined at their nonlinearities, 0.8 M parameters",
    ),
    Architecture(
        "vit-dual-patchnorm",
        lambda: ViT(ViTConfig(patch_norm=True, pool="mean")),
        (_DUAL, _VIT),
        "ViT with norms around its patch embedding and mean pooling, 0.8 M parameters",
    ),
)
