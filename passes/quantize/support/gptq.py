"""Rounding weights so that a layer's output on calibration data changes least (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.passes.quantize.support.quantization import GroupCodes, quantize_groups
from xformopt.program import Program, interpret, path_of, valid_positions, value_of

__all__ = ["Seen", "gptq", "gram_matrices"]

# part of the mean of the diagonal that is added to it, as published
_DAMPING = 0.01
# what the matrices of one run over the data may take; more values than fit take further runs
_GRAM_BYTES = 1 << 30


@dataclass
class Seen:
    """What is known of a value ``[..., C]`` from calibration data.

    Attributes:
        gram: ``X^T X`` over all valid positions, float64 ``[C, C]``.
        magnitude: The sum of ``|X|`` over them, float64 ``[C]``.
        count: How many positions.

    """

    gram: torch.Tensor
    magnitude: torch.Tensor
    count: int = 0


def gram_matrices(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    names: Sequence[str],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[dict[str, Seen]]:
    """Yield what is seen of the values in ``names``, of as many at a time as memory allows.

    Args:
        program: What to run.
        batches: Named inputs.
        names: Of graph values ``[..., C]``.
        progress: Called with (what, done, total).

    Yields:
        What was seen, by name.

    Raises:
        DataError: there are no batches, or a value is not finite.

    """
    if not batches:
        raise DataError(
            "Weights are quantized by what their layers see on calibration data, and there is none. Give some with "
            "--calibration (or calibration=... in Python), or round to the nearest code, which needs none."
        )
    widths = {node.name: int(value_of(node).shape[-1]) for node in program.graph.nodes if node.name in set(names)}
    parts = _fitting(widths)
    for index, part in enumerate(parts):
        progress("collecting layer inputs", index, len(parts))
        seen = {name: Seen(_zeros(widths[name], widths[name]), _zeros(widths[name])) for name in part}
        for batch in batches:
            interpret(program, batch, observe=_adding(program, batch, seen))
        yield seen


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _fitting(widths: Mapping[str, int]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    room = _GRAM_BYTES
    for name, width in widths.items():
        needed = 8 * width * width
        if parts[-1] and needed > room:
            parts.append([])
            room = _GRAM_BYTES
        parts[-1].append(name)
        room -= needed
    return parts


def _adding(
    program: Program, batch: Mapping[str, torch.Tensor], seen: Mapping[str, Seen]
) -> Callable[[fx.Node, Any], None]:
    def observe(node: fx.Node, value: Any) -> None:
        if node.name not in seen:
            return
        valid = valid_positions(program, node.meta["val"], batch)
        if valid is not None and valid.shape[-1] == 1:
            value = value[valid.expand(*value.shape[:-1], 1).squeeze(-1)]
        rows = value.reshape(-1, value.shape[-1]).double()
        if not bool(rows.isfinite().all()):
            raise DataError(
                f"On the calibration data, {path_of(node) or node.name} computes values that are NaN or infinite. Look "
                f"for the cause in the data or the model."
            )
        found = seen[node.name]
        found.gram += rows.t() @ rows
        found.magnitude += rows.abs().sum(0)
        found.count += len(rows)

    return observe


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
