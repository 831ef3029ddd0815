"""The definition of a linear layer."""

from __future__ import annotations

import torch

__all__ = ["linear"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x weight^T + bias`` with x ``[..., I]``, weight ``[O, I]``, bias ``[O]``; returns ``[..., O]``."""
    return torch.nn.functional.linear(x, weight, bias)
