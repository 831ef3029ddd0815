"""The definition of a residual sum followed by layer normalization."""

from __future__ import annotations

import torch

from xformopt.kernels.layer_norm import layer_norm

__all__ = ["add_layer_norm"]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of ``x + residual`` and the sum itself; all ``[..., C]``, the affine ``[C]``."""
    total = x + residual
    return layer_norm(total, weight, bias, eps=eps), total
