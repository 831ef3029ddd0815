"""How much each element of a value matters to the class scores: the average perturbation Hessian of APHQ-ViT.

    H = mean over samples |g(O + e) - g(O - e)|
    g(O') = d KL(softmax(scores(O') / 20) || softmax(scores / 20)) / d O'

O is the value, e a small number added to all of its elements (Wu et al., APHQ-ViT, CVPR 2025, arXiv 2504.02508).  The
paper's images are of one size, so that H has an entry for each position.  In samples that differ in length positions do
not correspond, and H has one for each channel: the mean over the valid positions of a sample.

Only the ratios of elements matter here.  Everything is computed in float64: with the authors' e of 1e-6, the two
gradients differ in float32 by little more than its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xformopt.program import Program, valid_positions
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
    """Return H of every floating-point value that one block hands to later ones, without the batch axis.

    That is ``[...]``; ``[C]`` where samples differ in length; and ``[1]`` where they differ in the last axis, too.

    Args:
        program: The original.
        batches: Named inputs.
        blocks: Of the program, all of them.
        scores: The name of the value that holds class scores, ``[..., classes]``.
        progress: Called with (what, done, total).

    """
    found: dict[str, list[_Sum]] = {}
    seen = 0
    nodes = {node.name: node for node in program.graph.nodes}
    for index, batch in enumerate(batches):
        if seen >= _SAMPLES:
            break
        progress("finding what matters", index, len(batches))
        for name, gradients in _differences(program, batch, blocks, scores).items():
            valid = valid_positions(program, nodes[name].meta["val"], batch)
            found.setdefault(name, []).append(_sum_of(gradients, valid))
        seen += max(len(value) for value in batch.values() if value.dim())
    return {name: (_total(parts) / seen).float() for name, parts in found.items()}


@dataclass(frozen=True)
class _Sum:
    """What the samples of one batch add up to: element by element, and as means over their valid positions ``[C]``."""

    elements: torch.Tensor
    channels: torch.Tensor


def _sum_of(gradients: torch.Tensor, valid: torch.Tensor | None) -> _Sum:
    counted = torch.ones_like(gradients) if valid is None else valid.expand_as(gradients).to(gradients.dtype)
    total, count = (x.flatten(1, -2).sum(1) for x in (gradients * counted, counted))
    return _Sum(gradients.sum(0), (total / count.clamp(min=1)).sum(0))


def _total(parts: Sequence[_Sum]) -> torch.Tensor:
    """Return the sum over batches, in the finest form that all of them have."""
    if len({part.elements.shape for part in parts}) == 1:
        return torch.stack([part.elements for part in parts]).sum(0)
    if len({part.channels.shape for part in parts}) == 1:
        return torch.stack([part.channels for part in parts]).sum(0)
    return torch.stack([part.channels.mean(0, keepdim=True) for part in parts]).sum(0)


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
