"""Triton kernel of ``xf.rope``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, power_of_two, room_for, rows_of, tiles

__all__ = ["KERNEL"]

# rotated numbers of a program
_NUMBERS = 2048


def _accepts(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, interleaved: bool = False
) -> Verdict:
    if x.dtype not in FLOATS or cos.dtype not in FLOATS or sin.dtype not in FLOATS:
        return f"it is in {x.dtype}, {cos.dtype} and {sin.dtype}"
    # the definition promotes; the kernel writes what it read
    if torch.promote_types(cos.dtype, x.dtype) != x.dtype or torch.promote_types(sin.dtype, x.dtype) != x.dtype:
        return f"angles in {cos.dtype} would turn {x.dtype} into another dtype"
    width: Any = x.shape[2]
    half: Any = cos.shape[2]
    return None if isinstance(width, int) and isinstance(half, int) else "the width of its heads is not fixed"


def _plan(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, interleaved: bool = False) -> Plan:
    from xformopt.kernels.triton_rows import rope_rows

    T, D, half = x.shape[1], x.shape[2] // heads, cos.shape[2]
    wide = power_of_two(half, 1)
    R = max(1, _NUMBERS // (2 * wide))
    tokens, (out, result) = rows_of(x, heads * D), room_for(x, *x.shape)
    rows = tokens.count * heads
    arguments = {
        **{"x": tokens.data, "cos": cos.contiguous(), "sin": sin.contiguous(), "out": out, "rows": rows, "T": T},
        **{"x_row": tokens.stride, "angle_batch": 0 if cos.shape[0] == 1 else T * half},
    }
    constants = {"HEADS": heads, "D": D, "HALF": half, "INTERLEAVED": interleaved, "R": R, "WIDE": wide}
    return Plan((Launch(rope_rows, (tiles(rows, R),), arguments, constants, 4, 1),), result)


KERNEL = Kernel(_plan, _accepts)
