"""What the zoo knows of one architecture: its name, how to build it, and where it was published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Architecture"]

_SEED = 0


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo; a family's file lists its own in ``ARCHITECTURES``.

    Attributes:
        name: What the command line calls it, such as ``deit-small``.
        module: Builds it with fresh weights; the module has ``example_inputs()``, named tensors for its ``forward``.
        sources: The publications that define it.
        summary: One line for a listing.

    """

    name: str
    module: Callable[[], nn.Module]
    sources: tuple[str, ...]
    summary: str

    def build(self, seed: int = _SEED) -> nn.Module:
        """Return the module in inference mode, its weights drawn from ``seed``; the global generator is left alone."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.module().eval().requires_grad_(False)
