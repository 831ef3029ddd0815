"""Triton kernel of ``xf.glu``."""

from __future__ import annotations

import torch

from xformopt.kernels.activation.triton import gated
from xformopt.kernels.triton_form import FLOATS, Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _plan(gate: torch.Tensor, up: torch.Tensor, *, function: str) -> Plan:
    return gated(gate, up, function)


def _accepts(gate: torch.Tensor, up: torch.Tensor, *, function: str) -> Verdict:
    if gate.dtype not in FLOATS or up.dtype != gate.dtype:
        return f"its operands are in {gate.dtype} and {up.dtype}, not in one floating dtype"
    if gate.dim() != up.dim() or any(a != b for a, b in zip(gate.shape, up.shape, strict=True)):
        return f"its operands are {tuple(gate.shape)} and {tuple(up.shape)}"
    return None


KERNEL = Kernel(_plan, _accepts)
