"""The definition of a linear layer with its activation."""

from __future__ import annotations

import torch

from xformopt.kernels.activation import activation
from xformopt.kernels.linear import linear

__all__ = ["linear_activation"]


def linear_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str
) -> torch.Tensor:
    """``function(x weight^T + bias)`` with x ``[..., I]``, weight ``[O, I]``, bias ``[O]``; returns ``[..., O]``."""
    return activation(linear(x, weight, bias), function=function)
