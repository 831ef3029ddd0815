"""The definition of a linear layer whose weights are -1 and 1, or -1, 0 and 1, times a scale."""

from __future__ import annotations

import torch

from xformopt.kernels.packing import unpack

__all__ = ["LEVELS", "ternary_linear"]

# what each code stands for, by the bits of a code; of two bits the last code is not used
LEVELS = {1: (-1.0, 1.0), 2: (-1.0, 0.0, 1.0, 0.0)}


def ternary_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int
) -> torch.Tensor:
    """``x W^T + bias`` with ``W = scale * level[code]``, computed in the dtype of ``x``.

    Args:
        x: ``[..., I]``.
        weight: Packed codes, uint8, ``[O, ceil(I * bits / 8)]``.
        scale: ``[O]``, or ``[1]`` for all rows.
        bias: ``[O]``.
        bits: 1 for two values, 2 for three.

    Returns:
        ``[..., O]``.

    """
    levels = torch.tensor(LEVELS[bits], dtype=x.dtype, device=x.device)
    codes = unpack(weight, bits, x.shape[-1]).long()
    return torch.nn.functional.linear(x, levels[codes] * scale.unsqueeze(1), bias)
