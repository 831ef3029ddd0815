"""Weights refitted to quantized inputs, so that a layer's output on calibration data changes least.

With X what reaches a layer, ``X^ = Q(X)`` what reaches it quantized, both centered:

    W* = argmin |X W^T - X^ W*^T|^2 + l |W* - W|^2 = (W X^T X^ + l W) (X^^T X^ + l I)^-1

W* is then rounded column after column (GPTQ) on ``X^^T X^``, and the bias takes what is left of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.passes.quantize.support.gptq import gptq
from xformopt.passes.quantize.support.low_bit import Layer, Quantizer
from xformopt.passes.quantize.support.quantization import dequantized
from xformopt.passes.samples import valid_rows
from xformopt.program import Program, interpret, value_of

__all__ = ["Moments", "observe_moments", "refitted"]

# part of the mean of the diagonal that holds the weights where they were
_DAMPING = 0.01
# what the matrices of one run over the data may take; more values than fit take further runs
_BYTES = 1 << 30


@dataclass
class Moments:
    """Sums over calibration data of a value ``x`` (``[..., C]``) and the same quantized, ``y``; float64."""

    cross: torch.Tensor
    square: torch.Tensor
    mean: torch.Tensor
    quantized_mean: torch.Tensor
    count: int = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add rows ``[N, C]``."""
        x, y = x.double(), y.double()
        self.cross += x.t() @ y
        self.square += y.t() @ y
        self.mean += x.sum(0)
        self.quantized_mean += y.sum(0)
        self.count += len(x)


def observe_moments(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    quantizers: Mapping[str, Quantizer],
    progress: Callable[[str, int, int], None],
) -> Iterator[dict[str, Moments]]:
    """Yield the moments of the values that ``quantizers`` are for, of as many at a time as memory allows."""
    widths = {node.name: int(value_of(node).shape[-1]) for node in program.graph.nodes if node.name in quantizers}
    parts: list[dict[str, Moments]] = []
    room = 0
    for name, width in widths.items():
        needed = 16 * width * width
        if needed > room:
            parts.append({})
            room = _BYTES
        room -= needed
        square = torch.zeros(width, width, dtype=torch.float64)
        parts[-1][name] = Moments(square, square.clone(), square[0].clone(), square[0].clone())
    for index, part in enumerate(parts):
        progress("collecting layer inputs", index, len(parts))
        for batch in batches:
            interpret(program, batch, observe=_adding(program, batch, part, quantizers))
        yield part


def _adding(
    program: Program,
    batch: Mapping[str, torch.Tensor],
    part: Mapping[str, Moments],
    quantizers: Mapping[str, Quantizer],
) -> Callable[[fx.Node, Any], None]:
    def observe(node: fx.Node, value: Any) -> None:
        if node.name in part:
            rows = valid_rows(program, batch, node, value)
            part[node.name].add(rows, quantizers[node.name].values(rows))

    return observe


def refitted(weight: torch.Tensor, bias: torch.Tensor | None, seen: Moments, bits: int) -> Layer:
    """Return the layer's codes, one scale and zero point per row, and its bias.

    Args:
        weight: ``[O, I]``.
        bias: ``[O]``, or None for zeros.
        seen: Of the layer's input.
        bits: Of a code.

    """
    mean, quantized_mean = seen.mean / seen.count, seen.quantized_mean / seen.count
    square = seen.square - seen.count * quantized_mean.outer(quantized_mean)
    cross = seen.cross - seen.count * mean.outer(quantized_mean)
    damping = _DAMPING * square.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    exact = weight.double()
    identity = torch.eye(len(square), dtype=torch.float64)
    wanted = torch.linalg.solve(square + damping * identity, exact @ cross + damping * exact, left=False)
    found = gptq(wanted.to(weight.dtype), square, bits=bits, group=weight.shape[1], symmetric=False)
    before = 0 if bias is None else bias.double()
    rest = exact @ mean - dequantized(found).double() @ quantized_mean
    return Layer(found.packed(), bits, (before + rest).to(weight.dtype))
