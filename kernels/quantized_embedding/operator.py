"""Schema, shape rule and cost of ``xf.quantized_embedding``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.packing import packed_size
from xformopt.kernels.quantized_embedding.reference import quantized_embedding

__all__ = ["OPERATOR"]


def _infer(
    weight: torch.Tensor, indices: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, bits: int
) -> torch.Tensor:
    torch._check(bits in (4, 8), lambda: "a code has 4 or 8 bits")
    (rows, groups), width = scale.shape, weight.shape[1] * 8 // bits
    torch._check(weight.shape[0] == rows, lambda: "weight and scale disagree on the number of rows")
    torch._check(width % groups == 0, lambda: "the groups of scale do not divide the width of weight")
    held = (rows, packed_size(groups, bits))
    torch._check(zero is None or zero.shape == held, lambda: "zero must hold one code per row and group")
    return scale.new_empty(*indices.shape, width)


def _flops(
    weight: torch.Tensor, indices: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, *, bits: int
) -> Any:
    return 2 * indices.numel() * (weight.shape[1] * 8 // bits)


OPERATOR = Operator(
    name="quantized_embedding",
    schema="(Tensor weight, Tensor indices, Tensor scale, Tensor? zero=None, *, int bits) -> Tensor",
    reference=quantized_embedding,
    infer=_infer,
    flops=_flops,
    level="target",
)
