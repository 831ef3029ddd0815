"""How much each element of a value matters to the class scores: the average perturbation Hessian of APHQ-ViT.

    H = mean over samples |g(O + e) - g(O - e)|
    g(O') = d KL(softmax(scores(O') / 20) || softmax(scores / 20)) / d O'

O is the value, e a small number added to all of its elements (Wu et al., APHQ-ViT, CVPR 2025, arXiv 2504.02508).  Only
the ratios of elements matter here.  Everything is computed in float64: with the authors' e of 1e-6, the two
gradients differ in float32 by little more than its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xformopt.errors import DataError
from xformopt.program import Program
from xformopt.reconstruction import Block, run_block

__all__ = ["perturbation_hessian"]

_PERTURBATION = 1e-6
_TEMPERATURE = 20.0
# gradients of this many samples are averaged
_SAMPLES = 64


def perturbation_hessian(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    blocks: Sequence[Block],
    scores: str,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, torch.Tensor]:
    """Return H of every floating-point value that one block hands to later ones, ``[...]`` without the batch axis.

    Args:
        program: The original.
        batches: Named inputs.
        blocks: Of the program, all of them.
        scores: The name of the value that holds class scores, ``[..., classes]``.
        progress: Called with (what, done, total).

    Raises:
        DataError: batches differ in the size of their samples.

    """
    totals: dict[str, torch.Tensor] = {}
    seen = 0
    for index, batch in enumerate(batches):
        if seen >= _SAMPLES:
            break
        progress("finding what matters", index, len(batches))
        rows = 0
        for name, gradients in _differences(program, batch, blocks, scores).items():
            rows = len(gradients)
            if name in totals and totals[name].shape != gradients.shape[1:]:
                raise DataError(
                    f"The value %{name} has the size {list(totals[name].shape)} in one calibration batch and "
                    f"{list(gradients.shape[1:])} in another, so that its elements cannot be weighted. Give inputs of "
                    f"one size."
                )
            totals[name] = totals.get(name, 0) + gradients.sum(0)
        seen += rows
    return {name: (total / seen).float() for name, total in totals.items()}


def _differences(
    program: Program, batch: Mapping[str, torch.Tensor], blocks: Sequence[Block], scores: str
) -> dict[str, torch.Tensor]:
    """Return ``|g(O + e) - g(O - e)|`` of each value for every sample of a batch."""
    values: dict[str, Any] = {name: _double(value) for name, value in batch.items()}
    with torch.no_grad():
        for block in blocks:
            values |= run_block(program, block, _inputs(block, values), double=True)
    wanted = torch.log_softmax(values[scores] / _TEMPERATURE, -1)
    found: dict[str, torch.Tensor] = {}
    for index, block in enumerate(blocks[:-1]):
        rest = _joined(blocks[index + 1 :], scores)
        for name in block.outputs:
            value = values[name]
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 2:
                sides = [
                    _gradient(program, rest, {**values, name: value + sign * _PERTURBATION}, name, scores, wanted)
                    for sign in (1, -1)
                ]
                found[name] = (sides[0] - sides[1]).abs()
    return found


def _gradient(
    program: Program, rest: Block, values: Mapping[str, Any], name: str, scores: str, wanted: torch.Tensor
) -> torch.Tensor:
    moved: torch.Tensor = values[name].requires_grad_()
    reached = run_block(program, rest, _inputs(rest, values), double=True)[scores]
    logits = torch.log_softmax(reached / _TEMPERATURE, -1)
    distance = (logits.exp() * (logits - wanted)).sum()
    return torch.autograd.grad(distance, moved)[0]


def _joined(blocks: Sequence[Block], scores: str) -> Block:
    """Return blocks as one."""
    nodes = tuple(name for block in blocks for name in block.nodes)
    read = dict.fromkeys(name for block in blocks for name in block.inputs)
    return Block("rest", nodes, tuple(name for name in read if name not in set(nodes)), (scores,))


def _inputs(block: Block, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in block.inputs}


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value
