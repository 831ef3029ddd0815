"""Schema, shape rule and cost of ``xf.rank_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.rank_tokens.reference import rank_tokens

__all__ = ["OPERATOR"]


def _infer(scores: torch.Tensor, *, prefix: int, r: int) -> torch.Tensor:
    B, T = scores.shape
    if isinstance(T, int):
        torch._check(0 <= r <= T - prefix, lambda: f"of {T - prefix} tokens, {r} cannot go")
    return scores.new_empty(B, T - r, dtype=torch.int64)


def _flops(*_: Any, **__: Any) -> int:
    """Scores are only compared."""
    return 0


OPERATOR = Operator(
    name="rank_tokens",
    schema="(Tensor scores, *, int prefix, int r) -> Tensor",
    reference=rank_tokens,
    infer=_infer,
    flops=_flops,
)
