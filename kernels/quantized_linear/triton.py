"""Triton kernel of ``xf.quantized_linear``: int8 products with 32-bit sums, scales and bias in one launch."""

from __future__ import annotations

import torch

from xformopt.kernels.linear_activation.triton import refusal
from xformopt.kernels.quantized_linear.reference import dynamic_range
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, room_for, rows_of, tiles

__all__ = ["KERNEL"]

_BLOCK = {"M": 64, "N": 128, "K": 64}


def _accepts(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> Verdict:
    return refusal(x, weight)


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> Plan:
    from xformopt.kernels.triton_matmul import integer_linear

    if x_scale is None or x_zero is None:
        x_scale, x_zero = dynamic_range(x)
    lines, (outputs, inputs) = rows_of(x, x.shape[-1]), weight.shape
    out, result = room_for(x, *x.shape[:-1], outputs)
    arguments = {
        **{"x": lines.data, "weight": weight.contiguous(), "scale": scale, "bias": bias},
        **{"x_scale": x_scale, "x_zero": x_zero, "out": out},
        **{"rows": lines.count, "outputs": outputs, "inputs": inputs, "x_row": lines.stride},
    }
    grid = (tiles(lines.count, _BLOCK["M"]) * tiles(outputs, _BLOCK["N"]),)
    return Plan((Launch(integer_linear, grid, arguments, _BLOCK, 8, 3),), result)


KERNEL = Kernel(_plan, _accepts)
