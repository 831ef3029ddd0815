"""Example inputs: small, always the same, and the global generator is left alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["example_images", "example_mask", "example_noise", "example_tokens"]

_SEED = 0


def example_noise(*shape: int) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))


def example_images(channels: int, size: int, batch: int = 2) -> Tensor:
    """Return ``[B, channels, size, size]`` in place of normalized pixels."""
    return example_noise(batch, channels, size, size)


def example_tokens(vocabulary: int, length: int, batch: int = 2) -> Tensor:
    """Return ``[B, T]`` token ids."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(_SEED))


def example_mask(length: int, batch: int = 2) -> Tensor:
    """Return a ``[B, T]`` mask, 1 on tokens and 0 on padding; the last row is padded by a quarter, the others not."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - length // 4 :] = 0
    return mask
