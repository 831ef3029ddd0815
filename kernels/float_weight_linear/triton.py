"""Triton kernel of ``xf.float_weight_linear``: codes become numbers in registers, on their way to the tensor cores."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.float_formats import FORMATS
from xformopt.kernels.linear_activation.triton import refusal
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, room_for, rows_of, tiles
from xformopt.kernels.weight_only_linear.triton import LEAST, is_few, step_of

__all__ = ["KERNEL"]

_BITS = (4, 8)


def _accepts(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    format: str,
) -> Verdict:
    if FORMATS[format].bits not in _BITS:
        return f"its codes have {FORMATS[format].bits} bits, not 4 or 8"
    if verdict := refusal(x, weight, bias):
        return verdict
    size: Any = x.shape[-1] // weight.shape[1]
    if step_of(size) < LEAST:
        return f"its groups have {size} channels, which {LEAST} does not divide"
    return None


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    format: str,
) -> Plan:
    from xformopt.kernels.triton_floats import float_codes_linear

    found, lines, inputs = FORMATS[format], rows_of(x, x.shape[-1]), x.shape[-1]
    outputs, groups, _ = weight.shape
    out, result = room_for(x, *x.shape[:-1], outputs)
    size = inputs // groups
    block = {"M": 16 if is_few(lines.count) else 64, "N": 64, "K": step_of(size)}
    arguments = {
        **{"x": lines.data, "weight": weight.contiguous(), "scale": scale.contiguous(), "base": base, "bias": bias},
        **{"out": out, "rows": lines.count, "outputs": outputs, "inputs": inputs, "x_row": lines.stride},
    }
    grid = (tiles(lines.count, block["M"]) * tiles(outputs, block["N"]),)
    constants = {"BITS": found.bits, "MANTISSA": found.mantissa, "BIAS": found.bias, "SIZE": size, **block}
    return Plan((Launch(float_codes_linear, grid, arguments, constants, 4, 3),), result)


KERNEL = Kernel(_plan, _accepts)
