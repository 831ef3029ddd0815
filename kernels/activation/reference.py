"""The definition of the activation functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["FUNCTIONS", "activation"]

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    # GELU (Hendrycks and Gimpel, arXiv 1606.08415): exact, and its tanh and sigmoid approximations
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    # SiLU, the swish of Ramachandran et al., arXiv 1710.05941
    "silu": functional.silu,
}


def activation(x: torch.Tensor, *, function: str) -> torch.Tensor:
    """Apply the named function to every element; same shape and dtype."""
    return FUNCTIONS[function](x)
