"""Schema, shape rule and cost of ``xf.rope``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.rope.reference import rope

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, interleaved: bool = False
) -> torch.Tensor:
    torch._check(x.shape[-1] // heads >= 2 * cos.shape[-1], lambda: "more features are rotated than a head has")
    return x.new_empty(x.shape)


def _flops(x: torch.Tensor, cos: torch.Tensor, *_: Any, heads: int, **__: Any) -> Any:
    """Three operations for each rotated element."""
    return 3 * x.shape[0] * x.shape[1] * heads * 2 * cos.shape[-1]


OPERATOR = Operator(
    name="rope",
    schema="(Tensor x, Tensor cos, Tensor sin, *, int heads, bool interleaved=False) -> Tensor",
    reference=rope,
    infer=_infer,
    flops=_flops,
)
