"""Schema, shape rule and cost of ``xf.layer_norm``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.layer_norm.reference import layer_norm

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, weight: torch.Tensor | None = None, *_: Any, eps: float, groups: int = 1) -> torch.Tensor:
    width = x.shape[-1] // groups
    torch._check(weight is None or weight.shape[0] == width, lambda: "x and weight disagree on the width of a group")
    return x.new_empty(x.shape)


def _flops(x: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Mean, variance, scaling and affine: eight operations an element."""
    return 8 * x.numel()


OPERATOR = Operator(
    name="layer_norm",
    schema="(Tensor x, Tensor? weight=None, Tensor? bias=None, *, float eps, int groups=1) -> Tensor",
    reference=layer_norm,
    infer=_infer,
    flops=_flops,
)
