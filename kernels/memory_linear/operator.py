"""Schema, shape rule and cost of ``xf.memory_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.memory_linear.reference import memory_linear

__all__ = ["OPERATOR"]

_MOST_BITS = 16


def _infer(
    x: torch.Tensor, tables: torch.Tensor, bias: torch.Tensor | None = None, *, temperature: float
) -> torch.Tensor:
    count, entries, outputs = tables.shape
    width = int(x.shape[-1]) // count
    torch._check(width * count == x.shape[-1], lambda: "the tables do not divide the width of x")
    fits = 1 <= width <= _MOST_BITS and entries == 2**width
    torch._check(fits, lambda: "a table must have one row for each vector of signs of its part of x")
    torch._check(bias is None or bias.shape == (outputs,), lambda: "bias must hold one number per output channel")
    torch._check(temperature > 0, lambda: "the temperature must be positive")
    return x.new_empty(*x.shape[:-1], outputs)


def _flops(x: torch.Tensor, tables: torch.Tensor, *_: Any, **__: Any) -> Any:
    """A multiply-add for each table and output; eight operations a channel, by convention, for its sigmoid."""
    return x.numel() // x.shape[-1] * (2 * tables.shape[0] * tables.shape[2] + 8 * x.shape[-1])


OPERATOR = Operator(
    name="memory_linear",
    schema="(Tensor x, Tensor tables, Tensor? bias=None, *, float temperature) -> Tensor",
    reference=memory_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
