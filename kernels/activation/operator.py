"""Schema, shape rule and cost of ``xf.activation``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.activation.reference import FUNCTIONS, activation
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, *, function: str) -> torch.Tensor:
    torch._check(function in FUNCTIONS, lambda: f"function {function!r} is not one of {', '.join(FUNCTIONS)}")
    return x.new_empty(x.shape)


def _flops(x: torch.Tensor, *, function: str) -> Any:
    """One operation for relu; eight an element, by convention, for what needs a transcendental function."""
    return x.numel() * (1 if function == "relu" else 8)


OPERATOR = Operator(
    name="activation",
    schema="(Tensor x, *, str function) -> Tensor",
    reference=activation,
    infer=_infer,
    flops=_flops,
)
