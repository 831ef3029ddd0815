"""Schema, shape rule and cost of ``xf.plan_packing``."""

from __future__ import annotations

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.plan_packing.reference import plan_packing

__all__ = ["OPERATOR"]


def _infer(mask: torch.Tensor, *, front: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(mask.dtype == torch.bool, lambda: "the mask must be boolean")
    torch._check(front >= 0, lambda: "front must not be negative")
    kept = torch.library.get_ctx().new_dynamic_size()
    sizes = (kept, mask.shape[0] + 1, mask.shape[0])
    places, offsets, keys = (mask.new_empty(size, dtype=torch.int64) for size in sizes)
    return places, offsets, keys


def _flops(mask: torch.Tensor, *, front: int = 0) -> int:
    """Integers only."""
    return 0


OPERATOR = Operator(
    name="plan_packing",
    schema="(Tensor mask, *, int front=0) -> (Tensor, Tensor, Tensor)",
    reference=plan_packing,
    infer=_infer,
    flops=_flops,
    level="target",
    has_data_sizes=True,
)
