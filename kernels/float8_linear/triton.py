"""Triton kernel of ``xf.float8_linear``: rows are rounded in one launch, multiplied as floats of 8 bits in the next."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.linear_activation.triton import refusal
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, power_of_two, room_for, rows_of, tiles

__all__ = ["KERNEL"]

# the first with tensor cores for E4M3
_CAPABILITY = (8, 9)
# numbers that a program rounds at once, and of a row at most
_NUMBERS, _MOST = 4096, 16384
# of a step: what tensor cores take of 8 bits at least, and what is taken
_LEAST, _STEP = 32, 128


def _step(size: int, groups: int) -> int:
    """Return how many input channels are taken at once; they lie in one group."""
    return _STEP if groups == 1 else min(_STEP, size & -size)


def _accepts(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Verdict:
    if verdict := refusal(x, weight, bias):
        return verdict
    width: Any = x.shape[-1]
    if width > _MOST:
        return f"its rows are {width} wide, more than {_MOST}"
    groups = weight.shape[1]
    if _step(width // groups, groups) < _LEAST:
        return f"its groups have {width // groups} channels, which {_LEAST} does not divide"
    return None


def _plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Plan:
    from xformopt.kernels.triton_floats import float8_products, round_rows

    lines, inputs, (outputs, groups, size) = rows_of(x, x.shape[-1]), x.shape[-1], weight.shape
    rows, (out, result) = lines.count, room_for(x, *x.shape[:-1], outputs)
    codes, steps = x.new_empty(rows, inputs, dtype=torch.uint8), x.new_empty(rows, dtype=torch.float32)
    wide = power_of_two(inputs)
    height = max(1, _NUMBERS // wide)
    rounding = Launch(
        round_rows,
        (tiles(rows, height),),
        {"x": lines.data, "codes": codes, "scale": steps, "rows": rows, "x_row": lines.stride},
        {"WIDTH": inputs, "R": height, "WIDE": wide},
        4 if wide <= _NUMBERS else 8,
        1,
    )
    block = {"M": 64, "N": 128, "K": _step(size, groups)}
    arguments = {
        **{"codes": codes, "x_scale": steps, "weight": weight.contiguous(), "scale": scale.contiguous()},
        **{"base": base, "bias": bias, "out": out, "rows": rows, "outputs": outputs, "inputs": inputs},
    }
    grid = (tiles(rows, block["M"]) * tiles(outputs, block["N"]),)
    product = Launch(float8_products, grid, arguments, {"SIZE": size, "GROUPS": groups, **block}, 4, 3)
    return Plan((rounding, product), result, (codes, steps))


KERNEL = Kernel(_plan, _accepts, capability=_CAPABILITY)
