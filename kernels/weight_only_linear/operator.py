"""Schema, shape rule and cost of ``xf.weight_only_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.packing import WIDTHS, packed_size
from xformopt.kernels.weight_only_linear.reference import weight_only_linear

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> torch.Tensor:
    torch._check(bits in WIDTHS, lambda: "a code has 2, 3, 4, 6 or 8 bits")
    rows, groups, size = weight.shape
    fits = x.shape[-1] % groups == 0 and size == packed_size(x.shape[-1] // groups, bits)
    torch._check(fits, lambda: "x and weight disagree on the input width")
    torch._check(scale.shape == (rows, groups), lambda: "scale must hold one number per output channel and group")
    held = (rows, packed_size(groups, bits))
    torch._check(zero is None or zero.shape == held, lambda: "zero must hold one code per output channel and group")
    return x.new_empty(*x.shape[:-1], rows)


def _flops(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> Any:
    return 2 * x.numel() * weight.shape[0]


OPERATOR = Operator(
    name="weight_only_linear",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? zero=None, Tensor? bias=None, *, int bits) -> Tensor",
    reference=weight_only_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
