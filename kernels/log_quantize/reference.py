"""The definition of simulated logarithmic quantization, with steps of a rational power of two.

    k = round(-(r / q) log2(x / scale)),    codes of 2^bits and more stand for 0, or are clipped to the last one
    y = scale 2^(-floor(k q / r)) table[(k q) mod r],    table[j] = 2^(-j / r)

The base is ``2^(q / r)``: base 2 with q = r = 1, base sqrt 2 with q = 1 and r = 2 (RepQuant, arXiv 2402.05628), and
AdaLog's with r = 37 and a q of choice (arXiv 2407.12951).  To run it, hardware needs a shift and a table of r entries,
of ``bits + 1`` bits each where they are rounded.  Here nothing executes in integers.
"""

from __future__ import annotations

import torch

__all__ = ["log_levels", "log_quantize", "log_table"]


def log_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    bits: int,
    numerator: int,
    denominator: int,
    round_table: bool = False,
    flush: bool = True,
) -> torch.Tensor:
    """Quantize and dequantize values from 0 to ``scale``, what lies outside clipped.

    Gradients go straight through to ``x`` where it is not clipped.

    Args:
        x: ``[...]``.
        scale: The largest value, a scalar.
        bits: Of a code, 2 to 8.
        numerator: q of the base ``2^(q / r)``.
        denominator: r.
        round_table: Round the entries of the table to multiples of ``1 / (2^(bits+1) - 2)``.
        flush: Whether values below the smallest level become 0, or that level.

    Returns:
        The shape and dtype of ``x``.

    """
    clipped = x.clamp(torch.zeros_like(scale), scale)
    # in double precision no platform's logarithm is far enough off to move a code
    logs = (clipped.detach().double() / scale.double()).log2()
    codes = (logs * (-denominator / numerator)).round().clamp(0, 2**bits).nan_to_num()
    levels = log_levels(bits, numerator, denominator, round_table=round_table, flush=flush).to(x.device)
    value = (levels * scale.double()).to(x.dtype)[codes.int()]
    value = torch.where(x.isnan(), x.detach(), value)
    return value + (clipped - clipped.detach()) if x.requires_grad else value


def log_levels(bits: int, numerator: int, denominator: int, *, round_table: bool, flush: bool) -> torch.Tensor:
    """Return what each code stands for at scale 1, and last what lies below them all, float64 ``[2^bits + 1]``."""
    steps = torch.arange(2**bits) * numerator
    table = log_table(bits, denominator, round_table)
    levels = torch.exp2(-(steps // denominator).double()) * table[steps % denominator]
    return torch.cat((levels, torch.zeros(1) if flush else levels[-1:]))


def log_table(bits: int, denominator: int, round_table: bool) -> torch.Tensor:
    """Return ``2^(-j / r)`` for j from 0 to r - 1, float64."""
    table = torch.exp2(-torch.arange(denominator, dtype=torch.float64) / denominator)
    if not round_table:
        return table
    steps = 2 ** (bits + 1) - 2
    rounded: torch.Tensor = (table * steps).round() / steps
    return rounded
