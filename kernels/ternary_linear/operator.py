"""Schema, shape rule and cost of ``xf.ternary_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.packing import packed_size
from xformopt.kernels.ternary_linear.reference import ternary_linear

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int
) -> torch.Tensor:
    torch._check(bits in (1, 2), lambda: "a code has 1 or 2 bits")
    held = packed_size(int(x.shape[-1]), bits)
    torch._check(weight.shape[1] == held, lambda: "x and weight disagree on the input width")
    fits = scale.dim() == 1 and scale.shape[0] in (1, weight.shape[0])
    torch._check(fits, lambda: "scale must hold one number, or one per output channel")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _flops(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Any:
    return 2 * x.numel() * weight.shape[0]


OPERATOR = Operator(
    name="ternary_linear",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, *, int bits) -> Tensor",
    reference=ternary_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
