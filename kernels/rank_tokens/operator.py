"""Schema, shape rule and cost of ``xf.rank_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.rank_tokens.reference import rank_tokens
from xformopt.kernels.token_counts import removed_tokens

__all__ = ["OPERATOR"]


def _infer(scores: torch.Tensor, *, prefix: int, r: int = 0, percent: int = 0) -> torch.Tensor:
    B, T = scores.shape
    gone = removed_tokens(T, prefix, r, percent)
    if isinstance(T, int):
        torch._check(0 <= gone <= T - prefix, lambda: f"of {T - prefix} tokens, {gone} cannot go")
    return scores.new_empty(B, T - gone, dtype=torch.int64)


def _flops(*_: Any, **__: Any) -> int:
    """Scores are only compared."""
    return 0


OPERATOR = Operator(
    name="rank_tokens",
    schema="(Tensor scores, *, int prefix, int r=0, int percent=0) -> Tensor",
    reference=rank_tokens,
    infer=_infer,
    flops=_flops,
)
