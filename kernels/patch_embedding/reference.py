"""The definition of patch embedding."""

from __future__ import annotations

import torch

__all__ = ["patch_embedding"]


def patch_embedding(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Project non-overlapping patches (ViT: Dosovitskiy et al., arXiv 2010.11929).

    Args:
        image: ``[B, I, H, W]``; rows and columns that fill no whole patch are dropped.
        weight: ``[C, I, P, Q]``, the kernel of a convolution whose stride is its size.
        bias: ``[C]``.

    Returns:
        Tokens in row-major order, ``[B, (H // P) * (W // Q), C]``.

    """
    tokens = torch.nn.functional.conv2d(image, weight, bias, stride=weight.shape[2:])
    return tokens.flatten(2).transpose(1, 2).contiguous()
