"""Schema, shape rule and cost of ``xf.unpack_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.unpack_tokens.reference import unpack_tokens

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    torch._check(x.shape[1] == places.shape[0], lambda: "x and places disagree on the number of tokens")
    return x.new_empty(mask.shape[0], mask.shape[1], x.shape[2])


def _flops(*_: Any) -> int:
    """Rows are only copied."""
    return 0


OPERATOR = Operator(
    name="unpack_tokens",
    schema="(Tensor x, Tensor places, Tensor mask) -> Tensor",
    reference=unpack_tokens,
    infer=_infer,
    flops=_flops,
    level="target",
)
