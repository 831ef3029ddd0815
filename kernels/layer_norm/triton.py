"""Triton kernel of ``xf.layer_norm``, and the plan that the other norms share."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, power_of_two, room_for, rows_of, tiles

__all__ = ["KERNEL", "MOST_COLUMNS", "norm", "refusal"]

# a row is held in registers: of 32 warps, 16 numbers a thread
MOST_COLUMNS = 16384
# numbers of a program, where rows are short
_NUMBERS = 2048


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    groups: int,
    center: bool,
) -> Plan:
    """Plan a norm over the last axis; with a residual the result is the norm and the sum."""
    from xformopt.kernels.triton_rows import norm_rows

    width = x.shape[-1] // groups
    wide = power_of_two(width, 1)
    lines = rows_of(x, width)
    others = None if residual is None else rows_of(residual, width)
    out, result = room_for(x, *x.shape)
    total, summed = (None, None) if residual is None else room_for(x, *x.shape)
    R = max(1, _NUMBERS // wide)
    arguments = {
        **{"x": lines.data, "residual": None if others is None else others.data, "total": total, "out": out},
        **{"weight": weight, "bias": bias},
        **{"rows": lines.count, "x_row": lines.stride},
        **{"residual_row": 0 if others is None else others.stride, "eps": eps},
    }
    constants = {"WIDTH": width, "CENTER": center, "R": R, "WIDE": wide}
    warps = min(32, max(4, R * wide // 512))
    launch = Launch(norm_rows, (tiles(lines.count, R),), arguments, constants, warps, 1)
    return Plan((launch,), result if summed is None else (result, summed))


def refusal(x: torch.Tensor, *others: torch.Tensor | None, groups: int) -> Verdict:
    """Say what of the operands the kernel does not take: ``others`` are the affine ones and the residual."""
    given = [x, *(other for other in others if other is not None)]
    if x.dtype not in FLOATS or any(other.dtype != x.dtype for other in given):
        return f"its operands are in {', '.join(str(other.dtype) for other in given)}, not in one floating dtype"
    width: Any = x.shape[-1]
    if not isinstance(width, int):
        return "the width of its rows is not fixed"
    if width // groups > MOST_COLUMNS:
        return f"its rows are {width // groups} wide, more than {MOST_COLUMNS}"
    return None


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    groups: int = 1,
) -> Plan:
    return norm(x, None, weight, bias, eps=eps, groups=groups, center=True)


def _accepts(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    groups: int = 1,
) -> Verdict:
    return refusal(x, weight, bias, groups=groups)


KERNEL = Kernel(_plan, _accepts)
