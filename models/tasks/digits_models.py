"""The model trained on the digits, one checkpoint for each fold, and how it was trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from xformopt.models.tasks.digits import DEVIATION, MEAN, SIZE, Digits
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained
from xformopt.models.vit import ViT, ViTConfig

__all__ = ["TRAINED", "distort", "some_patches"]

_BATCH = 32
_EPOCHS = 40
_SMOOTHING = 0.05
# share of the steps in which a ViT sees half of the patches
_PARTLY = 0.6
# how far an image is distorted at most: radians, share of the size, share of the size, share of half the side
_TURN, _GROWTH, _SHEAR, _SHIFT = math.radians(15), 0.12, 0.15, 0.12


def _vit() -> nn.Module:
    return ViT(ViTConfig(image_size=SIZE, in_channels=1, patch=4, width=64, depth=8, heads=4, mlp_ratio=2, classes=10))


def _train(module: nn.Module, fold: int, progress: Progress) -> None:
    """Cross-entropy with smoothed labels, on images distorted anew in every step."""
    images, labels = Digits(fold).training()

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        rows = torch.randint(len(images), (_BATCH,), generator=generator)
        shown = distort(images[rows], generator)
        with some_patches(module, generator, done < _PARTLY):
            logits = module(shown)["logits"]
        return nn.functional.cross_entropy(logits, labels[rows], label_smoothing=_SMOOTHING)

    fit(module, loss, Schedule(steps=_EPOCHS * len(images) // _BATCH, rate=1e-3, warmup=0.2), progress)


@contextlib.contextmanager
def some_patches(module: nn.Module, generator: torch.Generator, wanted: bool) -> Iterator[None]:
    """Let the blocks of a ViT see the class token and half of the patches of each image, drawn anew: PatchDropout
    (Liu et al., arXiv 2208.07220), which halves the time and regularizes.
    """
    if not wanted or not isinstance(module, ViT):
        yield
        return
    prefix, patches = module.config.prefix, module.config.patches

    def keep(backbone: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = arguments[0]  # [B, prefix + patches, C], positions added
        drawn = torch.rand(len(x), patches, generator=generator).argsort(1)[:, : patches // 2]
        kept = x[:, prefix:].gather(1, drawn.unsqueeze(2).expand(-1, -1, x.shape[2]))
        return (torch.cat([x[:, :prefix], kept], 1), *arguments[1:])

    handle = module.backbone.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shear and shift each image ``[N, 1, H, W]`` a little; what comes in from outside is background."""

    def drawn(reach: float, *more: int) -> torch.Tensor:
        return (torch.rand(len(images), *more, generator=generator) * 2 - 1) * reach

    angle, growth, shear = drawn(_TURN), 1 + drawn(_GROWTH), drawn(_SHEAR)
    maps = torch.zeros(len(images), 2, 3)
    maps[:, 0, 0], maps[:, 0, 1] = angle.cos() * growth, shear - angle.sin()
    maps[:, 1, 0], maps[:, 1, 1] = angle.sin(), angle.cos() * growth
    maps[:, :, 2] = drawn(_SHIFT, 2)
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    # the sampler fills with zeros, so zero has to be the background
    shifted = nn.functional.grid_sample(images + MEAN / DEVIATION, grid, align_corners=False)
    return shifted - MEAN / DEVIATION


TRAINED = (
    Trained(
        name="digits-vit",
        task="digits",
        module=_vit,
        train=_train,
        sources=("Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv 2010.11929",),
        summary="ViT of 8 layers and 65 tokens, trained on the digits",
        folds=Digits.folds,
    ),
)
