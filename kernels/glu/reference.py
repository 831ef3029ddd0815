"""The definition of the gated linear unit."""

from __future__ import annotations

import torch

from xformopt.kernels.activation import activation

__all__ = ["glu"]


def glu(gate: torch.Tensor, up: torch.Tensor, *, function: str) -> torch.Tensor:
    """``function(gate) * up`` (GEGLU, SwiGLU: Shazeer, arXiv 2002.05202); all of one shape ``[..., F]``."""
    return activation(gate, function=function) * up
