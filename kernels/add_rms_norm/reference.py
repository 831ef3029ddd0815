"""The definition of a residual sum followed by RMS normalization."""

from __future__ import annotations

import torch

from xformopt.kernels.rms_norm import rms_norm

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of ``x + residual`` and the sum itself; all ``[..., C]``, the affine ``[C]``."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total
