"""Schema, shape rule and cost of ``xf.glu``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.glu.reference import glu

__all__ = ["OPERATOR"]


def _infer(gate: torch.Tensor, up: torch.Tensor, *, function: str) -> torch.Tensor:
    torch._check(gate.shape[-1] == up.shape[-1], lambda: "gate and up disagree on their width")
    return gate.new_empty(gate.shape)


def _flops(gate: torch.Tensor, up: torch.Tensor, *, function: str) -> Any:
    """The activation by the convention of ``xf.activation``, and the product."""
    return 9 * gate.numel()


OPERATOR = Operator(
    name="glu",
    schema="(Tensor gate, Tensor up, *, str function) -> Tensor",
    reference=glu,
    infer=_infer,
    flops=_flops,
)
