"""Schema, shape rule and cost of ``xf.transform_tokens``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.transform_tokens.reference import transform_tokens

__all__ = ["OPERATOR"]


def _infer(
    metric: torch.Tensor,
    scores: torch.Tensor,
    sizes: torch.Tensor | None = None,
    *,
    prefix: int,
    neighbours: int,
    temperature: float,
    r: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T = metric.shape[:2]
    torch._check(neighbours > 0, lambda: "a token takes part in one anchor at least")
    if isinstance(T, int):
        torch._check(0 <= r < max(T - prefix, 1), lambda: f"of {T - prefix} tokens, {r} cannot go")
    return metric.new_empty(B, T - r, T), metric.new_empty(B, T - r, T)


def _flops(metric: torch.Tensor, *_: Any, prefix: int, r: int, **__: Any) -> Any:
    """The norm, the similarities, and six operations on each of them."""
    B, T, width = metric.shape
    pairs = (T - prefix - r) * (T - prefix)
    return B * (3 * T * width + 2 * pairs * width + 6 * pairs)


OPERATOR = Operator(
    name="transform_tokens",
    schema=(
        "(Tensor metric, Tensor scores, Tensor? sizes=None, *, int prefix, int neighbours, float temperature, "
        "int r) -> (Tensor, Tensor)"
    ),
    reference=transform_tokens,
    infer=_infer,
    flops=_flops,
)
