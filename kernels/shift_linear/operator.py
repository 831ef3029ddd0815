"""Schema, shape rule and cost of ``xf.shift_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.packing import packed_size
from xformopt.kernels.shift_linear.reference import shift_linear

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int, top: int
) -> torch.Tensor:
    torch._check(bits in (5, 6), lambda: "a code has 5 or 6 bits")
    held = packed_size(int(x.shape[-1]), bits)
    torch._check(weight.shape[1] == held, lambda: "x and weight disagree on the input width")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _flops(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * x.numel() * weight.shape[0]


OPERATOR = Operator(
    name="shift_linear",
    schema="(Tensor x, Tensor weight, Tensor? bias=None, *, int bits, int top) -> Tensor",
    reference=shift_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
