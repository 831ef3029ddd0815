"""Kernels and positions of a patch embedding for patches of another size.

Beyer et al., "FlexiViT", arXiv 2212.08013, section 3.4: a kernel is resized so that it answers to a resized patch as it
did to the patch itself, and positions are resized bilinearly on their grid.  Training for many sizes and choosing one
of them later take the same two functions, and so agree exactly.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["resize_kernel", "resize_matrix", "resize_positions"]


def resize_matrix(before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    """Return bilinear resizing of ``p x q`` pixels to ``p' x q'`` as a matrix ``[p' q', p q]``, float64."""
    count = before[0] * before[1]
    units = torch.eye(count, dtype=torch.float64).reshape(count, 1, *before)
    resized = torch.nn.functional.interpolate(units, after, mode="bilinear", align_corners=False, antialias=False)
    return resized.reshape(count, -1).t()


def resize_kernel(kernel: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return ``pinv(B^T) w`` for every filter ``w`` of a kernel ``[C, I, p, q]``: ``[C, I, p', q']``."""
    height, width = kernel.shape[2:]
    resized: torch.Tensor = kernel.double().flatten(2) @ _inverse((height, width), size).t()
    return resized.reshape(*kernel.shape[:2], *size).to(kernel.dtype).contiguous()


def resize_positions(table: torch.Tensor, before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    """Resize the grid at the end of positions bilinearly; those of class and distillation token stay.

    Args:
        table: ``[..., prefix + rows * columns, C]``.
        before: Rows and columns of its grid.
        after: Those wanted.

    Returns:
        ``[..., prefix + rows' * columns', C]``.

    """
    ahead = table.shape[-2] - before[0] * before[1]
    leading, grid = table[..., :ahead, :], table[..., ahead:, :]
    image = grid.reshape(1, *before, -1).permute(0, 3, 1, 2).double()
    resized = torch.nn.functional.interpolate(image, after, mode="bilinear", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(*grid.shape[:-2], -1, grid.shape[-1]).to(table.dtype)
    return torch.cat([leading, rows], -2).contiguous()


@cache
def _inverse(before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    inverse: torch.Tensor = torch.linalg.pinv(resize_matrix(before, after).t())
    return inverse
