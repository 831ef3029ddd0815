"""Schema, shape rule and cost of ``xf.log_quantize``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.log_quantize.reference import log_quantize

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor, scale: torch.Tensor, *, bits: int, numerator: int, denominator: int, **_: Any
) -> torch.Tensor:
    torch._check(2 <= bits <= 8, lambda: "a code has 2 to 8 bits")
    torch._check(scale.dim() == 0, lambda: "scale must be a scalar")
    torch._check(scale.dtype == x.dtype, lambda: "x and scale disagree on their type")
    torch._check(numerator >= 1, lambda: "the base must be larger than 1")
    torch._check(denominator >= 1, lambda: "the denominator must be positive")
    return torch.empty_like(x)


def _flops(x: torch.Tensor, scale: torch.Tensor, **_: Any) -> Any:
    """Eight operations an element, by convention, for what needs a transcendental function; twice."""
    return 16 * x.numel()


OPERATOR = Operator(
    name="log_quantize",
    schema=(
        "(Tensor x, Tensor scale, *, int bits, int numerator, int denominator, bool round_table=False, "
        "bool flush=True) -> Tensor"
    ),
    reference=log_quantize,
    infer=_infer,
    flops=_flops,
    level="target",
)
