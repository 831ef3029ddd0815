"""Schema, shape rule and cost of ``xf.select_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.select_tokens.reference import select_tokens

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], kept.shape[1], x.shape[2])


def _flops(*_: Any) -> int:
    """Rows are only copied."""
    return 0


OPERATOR = Operator(
    name="select_tokens",
    schema="(Tensor x, Tensor kept) -> Tensor",
    reference=select_tokens,
    infer=_infer,
    flops=_flops,
)
