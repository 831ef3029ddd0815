"""Schema, shape rule and cost of ``xf.fake_quantize``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.fake_quantize.reference import fake_quantize

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    *,
    bits: int,
    per_token: bool = False,
) -> torch.Tensor:
    torch._check(2 <= bits <= 8, lambda: "a code has 2 to 8 bits")
    torch._check(zero is None or scale is not None, lambda: "zero goes together with scale")
    torch._check(not per_token or scale is None, lambda: "a given scale is not per token")
    if scale is not None:
        fits = scale.dim() == 0 or scale.shape == x.shape[-1:]
        torch._check(fits, lambda: "scale must be a scalar or hold one number per channel")
        torch._check(zero is None or zero.shape == scale.shape, lambda: "scale and zero disagree on their shape")
        torch._check(scale.dtype == x.dtype, lambda: "x and scale disagree on their type")
    return torch.empty_like(x)


def _flops(x: torch.Tensor, scale: torch.Tensor | None = None, *_: Any, **__: Any) -> Any:
    """Division, two bounds, rounding and product; minimum and maximum where the range is found."""
    return (5 if scale is not None else 7) * x.numel()


OPERATOR = Operator(
    name="fake_quantize",
    schema="(Tensor x, Tensor? scale=None, Tensor? zero=None, *, int bits, bool per_token=False) -> Tensor",
    reference=fake_quantize,
    infer=_infer,
    flops=_flops,
    level="target",
)
