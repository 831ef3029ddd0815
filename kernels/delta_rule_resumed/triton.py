"""Triton kernel of ``xf.delta_rule_resumed``."""

from __future__ import annotations

import torch

from xformopt.kernels.delta_rule.triton import resumed
from xformopt.kernels.retention.triton import refusal
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _accepts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> Verdict:
    return refusal(q, k, v, beta, state, widths=(q.shape[2] // heads, v.shape[2] // heads))


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    heads: int,
    scale: float = 1.0,
) -> Plan:
    return resumed(q, k, v, beta, state, heads=heads, scale=scale)


KERNEL = Kernel(_plan, _accepts)
