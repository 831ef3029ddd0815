"""Schema, shape rule and cost of ``xf.mean_pool``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.mean_pool.reference import mean_pool

__all__ = ["OPERATOR"]


def _infer(x: torch.Tensor, mask: torch.Tensor, *, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[2])


def _flops(x: torch.Tensor, mask: torch.Tensor, *, eps: float) -> Any:
    return 2 * x.numel()


OPERATOR = Operator(
    name="mean_pool",
    schema="(Tensor x, Tensor mask, *, float eps) -> Tensor",
    reference=mean_pool,
    infer=_infer,
    flops=_flops,
)
