"""Triton kernel of ``xf.ssd``: its causal form is a recurrence with one decay a token and head."""

from __future__ import annotations

import torch

from xformopt.kernels.retention.triton import decayed, refusal
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _accepts(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    heads: int,
    groups: int = 1,
    causal: bool = True,
) -> Verdict:
    if not causal:
        return "it is not causal: two products of matrices, which torch computes as well"
    return refusal(x, b, c, widths=(b.shape[2] // groups, x.shape[2] // heads))


def _plan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    heads: int,
    groups: int = 1,
    causal: bool = True,
) -> Plan:
    x = x if x.stride(2) == 1 else x.contiguous()
    inputs = (x.unflatten(2, (heads, -1)) * dt.unsqueeze(3)).flatten(2).to(x.dtype)
    rate = None if d is None else d.contiguous()
    added = None if d is None else x
    return decayed(c, b, inputs, dt * a, heads=heads, group=heads // groups, added=added, rate=rate)


KERNEL = Kernel(_plan, _accepts)


KERNEL = Kernel(_plan, _accepts)
