"""Triton kernel of ``xf.add_rms_norm``: the sum and its norm in one pass over memory."""

from __future__ import annotations

import torch

from xformopt.kernels.add_layer_norm.triton import shapes_differ
from xformopt.kernels.layer_norm.triton import norm, refusal
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _plan(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float) -> Plan:
    return norm(x, residual, weight, None, eps=eps, groups=1, center=False)


def _accepts(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float) -> Verdict:
    return shapes_differ(x, residual) or refusal(x, residual, weight, groups=1)


KERNEL = Kernel(_plan, _accepts)
