"""Schema, shape rule and cost of ``xf.selective_scan``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.selective_scan.reference import selective_scan

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
) -> torch.Tensor:
    torch._check(a.shape[0] == x.shape[2], lambda: "there are not rates for each channel")
    torch._check(b.shape[2] == c.shape[2] == a.shape[1], lambda: "a, b and c disagree on the size of a state")
    return x.new_empty(x.shape)


def _flops(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, *_: Any) -> Any:
    """The recurrence, element by element: decay (2), what is added (1), the next state (2) and its reading (2)."""
    return 7 * x.numel() * a.shape[1]


OPERATOR = Operator(
    name="selective_scan",
    schema="(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d=None) -> Tensor",
    reference=selective_scan,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
