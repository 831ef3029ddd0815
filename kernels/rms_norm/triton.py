"""Triton kernel of ``xf.rms_norm``."""

from __future__ import annotations

import torch

from xformopt.kernels.layer_norm.triton import norm, refusal
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _plan(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float, groups: int = 1) -> Plan:
    return norm(x, None, weight, None, eps=eps, groups=groups, center=False)


def _accepts(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float, groups: int = 1) -> Verdict:
    return refusal(x, weight, groups=groups)


KERNEL = Kernel(_plan, _accepts)
