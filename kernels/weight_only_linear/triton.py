"""Triton kernel of ``xf.weight_only_linear``: codes become numbers in registers, on their way to the tensor cores."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.linear_activation.triton import refusal
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, room_for, rows_of, tiles

__all__ = ["KERNEL", "LEAST", "is_few", "step_of"]

_BITS = (4, 8)
# what a step of tensor cores takes
LEAST = 16
_MOST = 64


def step_of(size: int) -> int:
    """Return how many input channels are taken at once: a power of two that divides a group."""
    return min(_MOST, size & -size)


def _accepts(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> Verdict:
    if bits not in _BITS:
        return f"its codes have {bits} bits, not 4 or 8"
    if verdict := refusal(x, weight, scale, bias):
        return verdict
    size: Any = x.shape[-1] // weight.shape[1]
    if step_of(size) < LEAST:
        return f"its groups have {size} channels, which {LEAST} does not divide"
    return None


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> Plan:
    from xformopt.kernels.triton_matmul import packed_linear

    lines, (outputs, groups, _), inputs = rows_of(x, x.shape[-1]), weight.shape, x.shape[-1]
    out, result = room_for(x, *x.shape[:-1], outputs)
    size = inputs // groups
    # few rows: the weights are what takes time, and many programs read them
    block = {"M": 16 if is_few(lines.count) else 64, "N": 64, "K": step_of(size)}
    arguments = {
        **{"x": lines.data, "weight": weight.contiguous(), "scale": scale.contiguous()},
        **{"zero": None if zero is None else zero.contiguous(), "bias": bias, "out": out},
        **{"rows": lines.count, "outputs": outputs, "inputs": inputs, "x_row": lines.stride},
        "zero_row": 0 if zero is None else zero.shape[1],
    }
    grid = (tiles(lines.count, block["M"]) * tiles(outputs, block["N"]),)
    constants = {"BITS": bits, "SIZE": size, **block}
    return Plan((Launch(packed_linear, grid, arguments, constants, 4, 3),), result)


def is_few(rows: Any) -> bool:
    """Whether rows are fewer than a step of tensor cores takes: the weights are then what takes time."""
    return isinstance(rows, int) and rows <= LEAST


KERNEL = Kernel(_plan, _accepts)
