"""Triton kernel of ``xf.merge_tokens``: each kept token gathers those that join it."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, power_of_two

__all__ = ["KERNEL"]

# a token is held in registers
_MOST_WIDTH = 8192
_SOURCES = 128


def _accepts(
    x: torch.Tensor,
    kept: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    sizes: torch.Tensor | None = None,
) -> Verdict:
    if x.dtype not in FLOATS or (sizes is not None and sizes.dtype != x.dtype):
        return f"its tokens are in {x.dtype}, their sizes in {x.dtype if sizes is None else sizes.dtype}"
    width: Any = x.shape[2]
    if not isinstance(width, int) or width > _MOST_WIDTH:
        return f"its tokens are {width} wide, more than {_MOST_WIDTH}"
    return None


def _plan(
    x: torch.Tensor,
    kept: torch.Tensor,
    sources: torch.Tensor,
    destinations: torch.Tensor,
    sizes: torch.Tensor | None = None,
) -> Plan:
    from xformopt.kernels.triton_rows import merge_rows

    x = x if x.stride(2) == 1 else x.contiguous()
    (B, T, width), N = x.shape, kept.shape[1]
    out, totals = x.new_empty(B, N, width), x.new_empty(B, N)
    arguments = {
        **{"x": x, "kept": kept.contiguous(), "sources": sources.contiguous()},
        **{"destinations": destinations.contiguous(), "sizes": None if sizes is None else sizes.contiguous()},
        **{"out": out, "totals": totals, "T": T, "KEPT": N, "MERGED": sources.shape[1]},
        **{"x_batch": x.stride(0), "x_row": x.stride(1)},
    }
    constants = {"WIDTH": width, "LEAST": torch.finfo(x.dtype).tiny, "N": power_of_two(width), "S": _SOURCES}
    return Plan((Launch(merge_rows, (N, B), arguments, constants, 4, 1),), (out, totals))


KERNEL = Kernel(_plan, _accepts)
