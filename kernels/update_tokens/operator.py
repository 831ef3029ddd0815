"""Schema, shape rule and cost of ``xf.update_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.update_tokens.reference import update_tokens

__all__ = ["OPERATOR"]


def _infer(stored: torch.Tensor, kept: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    torch._check(stored.shape[2] == tokens.shape[2], lambda: "stored and tokens disagree on the channels")
    return stored.new_empty(stored.shape)


def _flops(*_: Any) -> int:
    """Rows are only copied."""
    return 0


OPERATOR = Operator(
    name="update_tokens",
    schema="(Tensor stored, Tensor kept, Tensor tokens) -> Tensor",
    reference=update_tokens,
    infer=_infer,
    flops=_flops,
)
