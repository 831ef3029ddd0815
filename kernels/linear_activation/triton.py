"""Triton kernel of ``xf.linear_activation``: bias and activation while the sums are in registers."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import FLOATS, Kernel, Launch, Plan, Verdict, rows_of, tiles

__all__ = ["KERNEL", "blocks_for", "refusal"]


def blocks_for(dtype: torch.dtype) -> tuple[dict[str, int], int, int]:
    """Return the block of rows, output and input channels, the warps that share it, and how many are loaded ahead."""
    if dtype == torch.float32:
        return {"M": 64, "N": 64, "K": 32}, 4, 3
    return {"M": 128, "N": 128, "K": 32}, 8, 4


def refusal(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> Verdict:
    """Say what of the operands no kernel of a linear layer takes; ``others`` are of the dtype of ``x``."""
    if x.dtype not in FLOATS or any(other is not None and other.dtype != x.dtype for other in others):
        given = [x, *(other for other in others if other is not None)]
        return f"its operands are in {', '.join(str(other.dtype) for other in given)}, not in one floating dtype"
    width: Any = x.shape[-1]
    return None if isinstance(width, int) else "the number of input channels is not fixed"


def _plan(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> Plan:
    from xformopt.kernels.triton_matmul import float_linear

    lines, out = rows_of(x, x.shape[-1]), x.new_empty(*x.shape[:-1], weight.shape[0])
    block, warps, stages = blocks_for(x.dtype)
    outputs, inputs = weight.shape
    arguments = {
        **{"x": lines, "weight": weight.contiguous(), "bias": bias, "out": out},
        **{"rows": lines.shape[0], "outputs": outputs, "inputs": inputs, "x_row": lines.stride(0)},
    }
    grid = (tiles(lines.shape[0], block["M"]) * tiles(outputs, block["N"]),)
    return Plan((Launch(float_linear, grid, arguments, {"FUNCTION": function, **block}, warps, stages),), out)


def _accepts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> Verdict:
    return refusal(x, weight, weight, bias)


KERNEL = Kernel(_plan, _accepts)
