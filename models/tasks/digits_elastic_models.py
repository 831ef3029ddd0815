"""Models trained on the digits to be of several sizes: which one is chosen when they are compiled, without training.

- MatFormer (Devvrit et al., arXiv 2310.07707): every step draws one share of the FFN width, and uses the first so many
  units of every FFN.  ``extract-prefixes`` takes a smaller model out of the trained one.
- FlexiViT (Beyer et al., arXiv 2212.08013): every step draws the size of the patches; kernel and positions are resized
  to it.  ``resize-patches`` does the same for good.
- HVT (Pan et al., arXiv 2103.10619): tokens are pooled between stages, and the model learns with that.

One checkpoint each, trained without the first fold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.func import functional_call

from xformopt.kernels.patch_embedding.resize import resize_kernel, resize_positions
from xformopt.models.blocks import Mlp, PatchEmbedding
from xformopt.models.hvt import Hvt, HvtConfig
from xformopt.models.tasks.digits import SIZE
from xformopt.models.tasks.digits_models import ONE_FOLD, Lessons, learn, smoothed
from xformopt.models.tasks.task import Progress
from xformopt.models.trained import Trained
from xformopt.models.vit import ViT, ViTConfig

__all__ = ["PATCHES", "SHARES", "TRAINED", "prefix_of", "with_patches"]

# the shares of the FFN width, and the sides of patches in pixels, that are drawn from
SHARES, PATCHES = (0.125, 0.25, 0.5, 1.0), (4, 8, 16)
_LESSONS = Lessons(40, rate=2e-3, warmup=0.2, partly=0)


def _matformer() -> nn.Module:
    """Return a ViT most of whose weights are in its FFNs."""
    return ViT(ViTConfig(image_size=SIZE, in_channels=1, patch=8, width=64, depth=6, heads=4))


def _flexivit() -> nn.Module:
    """Return a ViT whose kernel and positions are stored for the smallest patches."""
    return ViT(ViTConfig(image_size=SIZE, in_channels=1, patch=min(PATCHES), width=64, depth=5, heads=4, mlp_ratio=2))


def _hvt() -> nn.Module:
    """Four stages, of 64, 31, 15 and 7 tokens."""
    return Hvt(HvtConfig(image_size=SIZE, in_channels=1, patch=4, width=64, depths=(1, 2, 2, 1), heads=4))


def prefix_of(module: nn.Module, share: float) -> dict[str, torch.Tensor]:
    """Return the first units of every FFN, as weights to call ``module`` with: ``W_in[:m]`` and ``W_out[:, :m]``."""
    weights: dict[str, torch.Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, Mlp):
            m = round(part.widen.out_features * share)
            weights[f"{name}.widen.weight"] = part.widen.weight[:m]
            weights[f"{name}.widen.bias"] = part.widen.bias[:m]
            weights[f"{name}.narrow.weight"] = part.narrow.weight[:, :m]
    return weights


@contextlib.contextmanager
def with_patches(module: ViT, patch: int) -> Iterator[dict[str, torch.Tensor]]:
    """Let ``module`` cut images in patches of so many pixels; yields the weights to call it with."""
    embedding, config = cast(PatchEmbedding, module.embedding), module.config
    before, after = config.image_size // config.patch, config.image_size // patch
    embedding.projection.stride = (patch, patch)
    try:
        yield {
            "embedding.projection.weight": resize_kernel(embedding.projection.weight, (patch, patch)),
            "positions": resize_positions(module.positions, (before, before), (after, after)),
        }
    finally:
        embedding.projection.stride = (config.patch, config.patch)


def _nested(module: nn.Module, shown: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    share = SHARES[_place(len(SHARES), generator)]
    return smoothed(functional_call(module, prefix_of(module, share), (shown,))["logits"], labels)


def _flexible(module: nn.Module, shown: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    with with_patches(cast(ViT, module), PATCHES[_place(len(PATCHES), generator)]) as weights:
        return smoothed(functional_call(module, weights, (shown,))["logits"], labels)


def _plain(module: nn.Module, shown: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return smoothed(module(shown)["logits"], labels)


def _place(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (1,), generator=generator))


def _train_matformer(module: nn.Module, fold: int, progress: Progress) -> None:
    learn(module, fold, _nested, _LESSONS, progress)


def _train_flexivit(module: nn.Module, fold: int, progress: Progress) -> None:
    learn(module, fold, _flexible, _LESSONS, progress)


def _train_hvt(module: nn.Module, fold: int, progress: Progress) -> None:
    learn(module, fold, _plain, _LESSONS, progress)


TRAINED = (
    Trained(
        name="digits-matformer",
        task="digits",
        module=_matformer,
        train=_train_matformer,
        sources=("Devvrit et al. 2023, MatFormer: Nested Transformer for Elastic Inference, arXiv 2310.07707",),
        summary="ViT of 6 layers and 17 tokens with nested FFNs, trained on the digits at four FFN widths",
        tolerance=ONE_FOLD,
    ),
    Trained(
        name="digits-flexivit",
        task="digits",
        module=_flexivit,
        train=_train_flexivit,
        sources=("Beyer et al. 2022, FlexiViT: One Model for All Patch Sizes, arXiv 2212.08013",),
        summary="ViT of 5 layers, trained on the digits with patches of 4, 8 and 16 pixels",
        tolerance=ONE_FOLD,
    ),
    Trained(
        name="digits-hvt",
        task="digits",
        module=_hvt,
        train=_train_hvt,
        sources=("Pan et al. 2021, Scalable Vision Transformers with Hierarchical Pooling, arXiv 2103.10619",),
        summary="HVT of four stages with 64, 31, 15 and 7 tokens, trained on the digits",
        tolerance=ONE_FOLD,
    ),
)
