"""The models trained on the digits, one checkpoint for each fold, and how they were trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import nn

from xformopt.models.blocks import conv_norm
from xformopt.models.joined import join_branches
from xformopt.models.pvt import Pvt, PvtConfig
from xformopt.models.tasks.digits import DEVIATION, MEAN, SIZE, Digits
from xformopt.models.tasks.task import Progress
from xformopt.models.tasks.training import Schedule, fit
from xformopt.models.trained import Trained
from xformopt.models.vit import ViT, ViTConfig

__all__ = ["ONE_FOLD", "TRAINED", "Cost", "Lessons", "distort", "learn", "smoothed", "some_patches"]


@dataclass(frozen=True)
class Lessons:
    """How often a model sees the training folds, and how fast it learns.

    Attributes:
        epochs: Times that every image is seen.
        rate: The learning rate at its highest.
        warmup: Share of the steps in which the rate rises.
        partly: Share of the steps, at the start, in which a ViT sees half of the patches.

    """

    epochs: int
    rate: float = 1e-3
    warmup: float = 0.1
    partly: float = 0.6


# tolerance of a model with a single checkpoint: 360 items say less than all 1,797
ONE_FOLD = 0.01

_BATCH = 32
_VIT, _DEIT = Lessons(40, warmup=0.2), Lessons(30, rate=1.5e-3, warmup=0.2)
_PVT, _TEACHER = Lessons(30, rate=2e-3), Lessons(10, rate=2e-3)
_TEACHER_SEED = 0
_JOINED = Lessons(40, rate=1.5e-3, warmup=0.2)
_SMOOTHING = 0.05
# between which shares of the steps branches are joined
_JOINING = (0.1, 0.6)
# how far an image is distorted at most: radians, share of the size, share of the size, share of half the side
_TURN, _GROWTH, _SHEAR, _SHIFT = math.radians(15), 0.12, 0.15, 0.12

# the loss of a module on some distorted images with these labels; what else it needs is drawn from the generator
Cost: TypeAlias = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def _vit(depth: int, distillation: bool) -> nn.Module:
    return ViT(
        ViTConfig(
            image_size=SIZE,
            in_channels=1,
            patch=4,
            width=64,
            depth=depth,
            heads=4,
            mlp_ratio=2,
            classes=10,
            distillation=distillation,
        )
    )


def _joined(depth: int) -> nn.Module:
    """Twelve layers, as ``depth`` blocks of parallel branches."""
    return ViT(
        ViTConfig(
            image_size=SIZE,
            in_channels=1,
            patch=4,
            width=48,
            depth=depth,
            heads=3,
            mlp_ratio=2,
            classes=10,
            branches=12 // depth,
            joined=True,
        )
    )


def _pvt() -> nn.Module:
    """Three stages, of 64, 16 and 4 tokens."""
    return Pvt(
        PvtConfig(
            image_size=SIZE,
            in_channels=1,
            widths=(32, 48, 64),
            depths=(2, 2, 2),
            heads=(2, 3, 4),
            mlp_ratios=(4, 4, 4),
            reductions=(4, 2, 1),
            classes=10,
        )
    )


def _convolutions() -> nn.Module:
    """Return a teacher with fresh weights: a small convolutional network, ``[N, 1, 32, 32]`` to logits ``[N, 10]``."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(_TEACHER_SEED)
        return nn.Sequential(
            *(conv_norm(1, 16, 5, 2, 2), nn.ReLU()),
            *(conv_norm(16, 32, 3, 2, 1), nn.ReLU()),
            *(conv_norm(32, 64, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * (SIZE // 8) ** 2, 10)),
        )


def _train(module: nn.Module, fold: int, progress: Progress, lessons: Lessons) -> None:
    """Cross-entropy with smoothed labels."""

    def cost(module: nn.Module, shown: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return smoothed(module(shown)["logits"], labels)

    learn(module, fold, cost, lessons, progress)


def _join(module: nn.Module, fold: int, progress: Progress) -> None:
    """Cross-entropy, while the branches of every block are joined (Zhou et al., arXiv 2511.19718): ``lambda`` rises
    linearly from 0 to 1 and stays there.
    """

    def cost(module: nn.Module, shown: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return smoothed(module(shown)["logits"], labels)

    def begin(done: float) -> None:
        first, last = _JOINING
        join_branches(module, min(max((done - first) / (last - first), 0.0), 1.0))

    learn(module, fold, cost, _JOINED, progress, begin)


def _distill(module: nn.Module, fold: int, progress: Progress) -> None:
    """Hard-label distillation (Touvron et al., arXiv 2012.12877, equation 3): half the cross-entropy of the class token
    with the labels, half that of the distillation token with what a teacher decides on the same distorted images; the
    labels are smoothed, its decisions are not.

    The teacher learns first, from the same training folds, so that nothing that is tested reaches the student by it.
    """
    teacher = _convolutions()

    def teaching(teacher: nn.Module, shown: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return smoothed(teacher(shown), labels)

    def cost(module: nn.Module, shown: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        logits, distilled = cast(ViT, module).answers(shown)
        decided = teacher(shown).argmax(1)
        return (smoothed(logits, labels) + nn.functional.cross_entropy(distilled, decided)) / 2

    learn(teacher, fold, teaching, _TEACHER, lambda what, done, total: progress(f"the teacher: {what}", done, total))
    learn(module, fold, cost, _DEIT, progress)


def learn(
    module: nn.Module,
    fold: int,
    cost: Cost,
    lessons: Lessons,
    progress: Progress,
    begin: Callable[[float], None] = lambda done: None,
) -> None:
    """Train on every fold but one, on images distorted anew in every step, which ``begin`` opens."""
    images, labels = Digits(fold).training()

    def loss(module: nn.Module, generator: torch.Generator, done: float) -> torch.Tensor:
        begin(done)
        rows = torch.randint(len(images), (_BATCH,), generator=generator)
        shown = distort(images[rows], generator)
        with some_patches(module, generator, done < lessons.partly):
            return cost(module, shown, labels[rows], generator)

    steps = lessons.epochs * len(images) // _BATCH
    fit(module, loss, Schedule(steps=steps, rate=lessons.rate, warmup=lessons.warmup), progress)


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of logits ``[N, 10]`` with smoothed labels."""
    return nn.functional.cross_entropy(logits, labels, label_smoothing=_SMOOTHING)


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


_DOSOVITSKIY = "Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, arXiv 2010.11929"

TRAINED = (
    Trained(
        name="digits-vit",
        task="digits",
        module=partial(_vit, depth=8, distillation=False),
        train=partial(_train, lessons=_VIT),
        sources=(_DOSOVITSKIY,),
        summary="ViT of 8 layers and 65 tokens, trained on the digits",
        folds=Digits.folds,
    ),
    Trained(
        name="digits-deit",
        task="digits",
        module=partial(_vit, depth=6, distillation=True),
        train=_distill,
        sources=("Touvron et al. 2020, Training data-efficient image transformers, arXiv 2012.12877", _DOSOVITSKIY),
        summary="DeiT of 6 layers and 66 tokens, distilled from a small convolutional network on the digits",
        folds=Digits.folds,
    ),
    *(
        Trained(
            name=f"digits-joined{depth}",
            task="digits",
            module=partial(_joined, depth),
            train=_join,
            sources=(
                "Zhou et al. 2025, Rethinking Vision Transformer Depth via Structural Reparameterization, arXiv "
                "2511.19718",
                _DOSOVITSKIY,
            ),
            summary=f"ViT of {depth} blocks with {12 // depth} joined branches each, trained on the digits",
            tolerance=ONE_FOLD,
        )
        for depth in (6, 4, 3)
    ),
    Trained(
        name="digits-pvt",
        task="digits",
        module=_pvt,
        train=partial(_train, lessons=_PVT),
        sources=("Wang et al. 2021, PVT v2: Improved Baselines with Pyramid Vision Transformer, arXiv 2106.13797",),
        summary="PVT v2 of three stages with 64, 16 and 4 tokens, trained on the digits",
        folds=Digits.folds,
    ),
)
