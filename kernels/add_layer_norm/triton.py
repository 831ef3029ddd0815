"""Triton kernel of ``xf.add_layer_norm``: the sum and its norm in one pass over memory."""

from __future__ import annotations

import torch

from xformopt.kernels.layer_norm.triton import norm, refusal
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL", "shapes_differ"]


def shapes_differ(x: torch.Tensor, residual: torch.Tensor) -> Verdict:
    """Say that a residual would have to be broadcast, or None."""
    if x.dim() != residual.dim() or any(a != b for a, b in zip(x.shape, residual.shape, strict=True)):
        return f"the residual is {tuple(residual.shape)}, not {tuple(x.shape)} as what it is added to"
    return None


def _plan(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> Plan:
    return norm(x, residual, weight, bias, eps=eps, groups=1, center=True)


def _accepts(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> Verdict:
    return shapes_differ(x, residual) or refusal(x, residual, weight, bias, groups=1)


KERNEL = Kernel(_plan, _accepts)
