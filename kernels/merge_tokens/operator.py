"""Schema, shape rule and cost of ``xf.merge_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.merge_tokens.reference import merge_tokens

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, kept: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = x.new_empty(x.shape[0], kept.shape[1], x.shape[2])
    return tokens, x.new_empty(x.shape[0], kept.shape[1])


def _flops(x: torch.Tensor, *_: Any) -> Any:
    """Every token is weighted, then added or divided."""
    return 2 * x.numel()


OPERATOR = Operator(
    name="merge_tokens",
    schema=("(Tensor x, Tensor kept, Tensor sources, Tensor destinations, Tensor? sizes=None) -> (Tensor, Tensor)"),
    reference=merge_tokens,
    infer=_infer,
    flops=_flops,
)
