"""Schema, shape rule and cost of ``xf.pack_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.pack_tokens.reference import pack_tokens

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    torch._check(x.dim() == 3, lambda: "x must be [B, T, C]")
    return x.new_empty(1, places.shape[0], x.shape[2])


def _flops(*_: Any) -> int:
    """Rows are only copied."""
    return 0


OPERATOR = Operator(
    name="pack_tokens",
    schema="(Tensor x, Tensor places) -> Tensor",
    reference=pack_tokens,
    infer=_infer,
    flops=_flops,
    level="target",
)
