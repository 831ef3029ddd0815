"""Rounding weights so that a layer's output on calibration data changes least (GPTQ)."""

from __future__ import annotations

import torch

from xformopt.passes.quantize.support.quantization import GroupCodes, quantize_groups

__all__ = ["gptq"]

# part of the mean of the diagonal that is added to it, as published
_DAMPING = 0.01


def gptq(weight: torch.Tensor, gram: torch.Tensor, *, bits: int, group: int, symmetric: bool) -> GroupCodes:
    """Round column after column, each time moving the others so that they make up for the error.

    With ``H = 2 X^T X`` (damped) and ``U`` the upper Cholesky factor of its inverse: column j is rounded, and its error
    ``(w_j - w^_j) / U_jj`` times row j of U is taken from the columns behind it.  A group's scale and zero point are
    chosen when its first column is reached.  Channels that are always zero get the weight zero.

    Frantar et al., arXiv 2210.17323, algorithm 1; unlike there, X is what the layer sees in the original program.

    Args:
        weight: ``[O, I]``.
        gram: ``X^T X``, float64 ``[I, I]``.
        bits: Of a code.
        group: Columns that share a scale; divides I.
        symmetric: Whether zero is the middle code.

    """
    rows, columns = weight.shape
    left = weight.double().clone()
    hessian = 2 * gram
    silent = hessian.diagonal() == 0
    left[:, silent] = 0
    hessian = hessian + torch.diag(silent.double() + _DAMPING * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    for start in range(0, columns, group):
        end = start + group
        found = quantize_groups(left[:, start:end].float(), bits=bits, group=group, symmetric=symmetric)
        zero = torch.full((rows, 1), 2 ** (bits - 1)) if found.zero is None else found.zero
        scales.append(found.scale)
        zeros.append(zero.to(torch.uint8))
        step, shift = found.scale[:, 0].double(), zero[:, 0].double()
        errors = torch.zeros(rows, group, dtype=torch.float64)
        for column in range(start, end):
            code = ((left[:, column] / step).round() + shift).clamp(0, 2**bits - 1)
            codes[:, column] = code.to(torch.uint8)
            error = (left[:, column] - (code - shift) * step) / factor[column, column]
            left[:, column:end] -= error.unsqueeze(1) * factor[column, column:end]
            errors[:, column - start] = error
        # columns of later groups are reached once a group
        left[:, end:] -= errors @ factor[start:end, end:]
    stored = None if symmetric else torch.cat(zeros, 1)
    return GroupCodes(codes, torch.cat(scales, 1).to(weight.dtype), stored, bits)
