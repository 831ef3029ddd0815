"""Triton kernel of ``xf.selective_scan``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL"]

# tokens of a chunk, and numbers of the states of a program's channels
_TOKENS, _STATES = 32, 128
_MOST_STATES = 64


def _accepts(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
) -> Verdict:
    given = [x, dt, a, b, c, *(() if d is None else (d,))]
    if any(operand.dtype not in FLOATS for operand in given):
        return f"its operands are in {', '.join(str(operand.dtype) for operand in given)}"
    states: Any = a.shape[1]
    if not isinstance(states, int) or not isinstance(x.shape[2], int):
        return "the number of its channels or states is not fixed"
    return f"it has {states} states a channel, more than {_MOST_STATES}" if states > _MOST_STATES else None


def _plan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
) -> Plan:
    from xformopt.kernels.triton_scan import selective_chunks

    x, dt, b, c = (v if v.stride(2) == 1 else v.contiguous() for v in (x, dt, b, c))
    (B, T, width), states = x.shape, a.shape[1]
    out = x.new_empty(B, T, width)
    wide = power_of_two(states, 1)
    M = max(1, _STATES // wide)
    named = (("x", x), ("dt", dt), ("b", b), ("c", c))
    arguments = {
        **dict(named),
        **{"a": a.contiguous(), "d": None if d is None else d.contiguous(), "out": out, "T": T},
        **{f"{name}_batch": value.stride(0) for name, value in named},
        **{f"{name}_row": value.stride(1) for name, value in named},
    }
    constants = {"WIDTH": width, "N": states, "L": _TOKENS, "M": M, "WIDE": wide}
    return Plan((Launch(selective_chunks, (tiles(width, M), B), arguments, constants, 4, 2),), out)


KERNEL = Kernel(_plan, _accepts)
