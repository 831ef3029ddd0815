"""Schema, shape rule and cost of ``xf.changed_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.changed_tokens.reference import changed_tokens
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, reference: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    torch._check(x.dim() == 3 and reference.dim() == 3, lambda: "tokens must be [B, T, C]")
    torch._check(x.shape[2] == reference.shape[2], lambda: "x and reference disagree on the channels")
    torch._check(ranks.dim() == 1, lambda: "ranks must have one axis")
    return x.new_empty(x.shape[0], ranks.shape[0], dtype=torch.int64)


def _flops(x: torch.Tensor, *_: Any) -> Any:
    """A difference, a square and a sum; ranking only compares."""
    return 3 * x.numel()


OPERATOR = Operator(
    name="changed_tokens",
    schema="(Tensor x, Tensor reference, Tensor ranks) -> Tensor",
    reference=changed_tokens,
    infer=_infer,
    flops=_flops,
)
