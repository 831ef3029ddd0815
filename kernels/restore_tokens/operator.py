"""Schema, shape rule and cost of ``xf.restore_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.restore_tokens.reference import restore_tokens

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, kept: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], kept.shape[1] + sources.shape[1], x.shape[2])


def _flops(*_: Any) -> int:
    """Rows are only copied."""
    return 0


OPERATOR = Operator(
    name="restore_tokens",
    schema="(Tensor x, Tensor kept, Tensor sources, Tensor destinations) -> Tensor",
    reference=restore_tokens,
    infer=_infer,
    flops=_flops,
)
