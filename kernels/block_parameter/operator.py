"""Schema, shape rule and cost of ``xf.block_parameter``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from xformopt.kernels.block_parameter.reference import block_parameter
from xformopt.kernels.definition import Operator
from xformopt.kernels.packing import packed_size

__all__ = ["OPERATOR"]


def _infer(
    codes: torch.Tensor, exponents: torch.Tensor, *, bits: int, block: int, shape: Sequence[int]
) -> torch.Tensor:
    torch._check(bits in (4, 8), lambda: "a code has 4 or 8 bits")
    count = math.prod(shape)
    torch._check(codes.shape == (packed_size(count, bits),), lambda: "codes must hold as many codes as shape has")
    torch._check(exponents.shape == (-(-count // block),), lambda: "exponents must hold one number per block")
    return codes.new_empty(list(shape), dtype=torch.float32)


def _flops(codes: torch.Tensor, exponents: torch.Tensor, *, shape: Sequence[int], **_: Any) -> Any:
    return 2 * math.prod(shape)


OPERATOR = Operator(
    name="block_parameter",
    schema="(Tensor codes, Tensor exponents, *, int bits, int block, int[] shape) -> Tensor",
    reference=block_parameter,
    infer=_infer,
    flops=_flops,
    level="target",
)
