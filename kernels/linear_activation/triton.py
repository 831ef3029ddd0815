"""Triton kernel of ``xf.linear_activation``: bias and activation while the sums are in registers."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.triton_form import (
    FLOATS,
    Kernel,
    Launch,
    Plan,
    Tile,
    Trial,
    Verdict,
    room_for,
    rows_of,
    tile_of,
    tiles,
)

__all__ = ["KERNEL", "refusal"]


# rows that tiles are timed on
_ROWS = 4096


def _tiles_for(dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return blocks of rows and output channels in steps of K input channels, the default first."""
    if dtype == torch.float32:
        return Tile(64, 64, 4, 3, 32), Tile(128, 64, 8, 3, 32), Tile(64, 128, 8, 3, 32), Tile(32, 64, 4, 3, 32)
    return (
        Tile(128, 128, 8, 4, 32),
        Tile(128, 256, 8, 3, 64),
        Tile(128, 128, 8, 3, 64),
        Tile(128, 128, 4, 4, 32),
        Tile(128, 64, 4, 4, 32),
        Tile(64, 128, 4, 4, 64),
        Tile(64, 64, 4, 4, 64),
    )


def _key(weight: torch.Tensor) -> str:
    outputs, inputs = weight.shape
    return f"linear_activation in {weight.dtype}, {inputs} to {outputs}"


def _trial(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> Trial:
    dtype, (outputs, inputs) = x.dtype, weight.shape

    def operands(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = ((_ROWS, inputs), (outputs, inputs), (outputs,))
        return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes), {"function": function}

    return Trial(_key(weight), _tiles_for(dtype), operands)


def refusal(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> Verdict:
    """Say what of the operands no kernel of a linear layer takes; ``others`` are of the dtype of ``x``."""
    if x.dtype not in FLOATS or any(other is not None and other.dtype != x.dtype for other in others):
        given = [x, *(other for other in others if other is not None)]
        return f"its operands are in {', '.join(str(other.dtype) for other in given)}, not in one floating dtype"
    width: Any = x.shape[-1]
    return None if isinstance(width, int) else "the number of input channels is not fixed"


def _plan(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> Plan:
    from xformopt.kernels.triton_matmul import float_linear

    lines, (out, result) = rows_of(x, x.shape[-1]), room_for(x, *x.shape[:-1], weight.shape[0])
    tile = tile_of(_key(weight), _tiles_for(x.dtype)[0])
    outputs, inputs = weight.shape
    arguments = {
        **{"x": lines.data, "weight": weight.contiguous(), "bias": bias, "out": out},
        **{"rows": lines.count, "outputs": outputs, "inputs": inputs, "x_row": lines.stride},
    }
    constants = {"FUNCTION": function, "M": tile.M, "N": tile.N, "K": tile.K}
    grid = (tiles(lines.count, tile.M) * tiles(outputs, tile.N),)
    return Plan((Launch(float_linear, grid, arguments, constants, tile.warps, tile.stages),), result)


def _accepts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, function: str) -> Verdict:
    return refusal(x, weight, weight, bias)


KERNEL = Kernel(_plan, _accepts, _trial)
