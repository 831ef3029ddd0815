"""Schema, shape rule and cost of ``xf.pack_bits``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.pack_bits.reference import pack_bits
from xformopt.kernels.packing import packed_size

__all__ = ["OPERATOR"]


def _infer(bits: torch.Tensor) -> torch.Tensor:
    torch._check(bits.dtype == torch.bool, lambda: "bits must be bool")
    return bits.new_empty(*bits.shape[:-1], packed_size(int(bits.shape[-1]), 1), dtype=torch.uint8)


def _flops(*_: Any) -> int:
    """Bits are only moved."""
    return 0


OPERATOR = Operator(
    name="pack_bits",
    schema="(Tensor bits) -> Tensor",
    reference=pack_bits,
    infer=_infer,
    flops=_flops,
)
