"""Schema, shape rule and cost of ``xf.ternary_weight``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.ternary_weight.reference import ternary_weight

__all__ = ["OPERATOR"]


def _infer(weight: torch.Tensor, *, bits: int, per_row: bool = False) -> torch.Tensor:
    torch._check(bits in (1, 2), lambda: "a weight has 1 or 2 bits")
    torch._check(weight.dim() == 2, lambda: "the weight must be a matrix")
    return torch.empty_like(weight)


def _flops(weight: torch.Tensor, **_: Any) -> Any:
    """Two means, then difference, division, two bounds, rounding and product."""
    return 8 * weight.numel()


OPERATOR = Operator(
    name="ternary_weight",
    schema="(Tensor weight, *, int bits, bool per_row=False) -> Tensor",
    reference=ternary_weight,
    infer=_infer,
    flops=_flops,
    level="target",
)
