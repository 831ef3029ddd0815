"""The definition of a linear layer whose weight is stored in floating point of few bits."""

from __future__ import annotations

import torch

from xformopt.kernels.float_formats import FORMATS, scale_values, unpack_floats

__all__ = ["float_weight_linear"]


def float_weight_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    format: str,
) -> torch.Tensor:
    """``x W^T + bias`` with ``W = values[codes] * scale``, computed in the dtype of ``x``.

    Args:
        x: ``[..., I]``.
        weight: Packed codes, uint8, ``[O, G, I / G * bits / 8]``: G groups of neighbouring input channels.
        scale: What 1 is worth in each group, ``[O, G]``: floating-point numbers; or uint8, which are codes of E8M0
            (powers of two, MX), or codes of E4M3 in multiples of ``base``.
        base: A scalar.
        bias: ``[O]``.
        format: One of ``kernels.float_formats.FORMATS``.

    Returns:
        ``[..., O]``.

    """
    found = FORMATS[format]
    values = found.table(x)[unpack_floats(weight, found.bits).long()]
    matrix = values * scale_values(scale, base, x).unsqueeze(-1)
    return torch.nn.functional.linear(x, matrix.flatten(1), bias)
