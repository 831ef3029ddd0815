"""Schema, shape rule and cost of ``xf.sparse_factor_linear``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.packing import PERIODS, packed_size
from xformopt.kernels.sparse_factor_linear.reference import sparse_factor_linear

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    basis: torch.Tensor,
    places: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
) -> torch.Tensor:
    torch._check(bits in PERIODS, lambda: "a place has 1, 2, 3, 4, 5, 6 or 8 bits")
    torch._check(x.shape[-1] == basis.shape[1], lambda: "x and basis disagree on the input width")
    torch._check(basis.shape[0] <= 2**bits, lambda: "the basis has more vectors than places can name")
    held = (values.shape[0], packed_size(int(values.shape[1]), bits))
    torch._check(places.shape == held, lambda: "places must hold one code for each value")
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _flops(x: torch.Tensor, basis: torch.Tensor, places: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Two dense products: targets have no sparse one."""
    return 2 * x.numel() // x.shape[-1] * basis.shape[0] * (x.shape[-1] + values.shape[0])


OPERATOR = Operator(
    name="sparse_factor_linear",
    schema="(Tensor x, Tensor basis, Tensor places, Tensor values, Tensor? bias=None, *, int bits) -> Tensor",
    reference=sparse_factor_linear,
    infer=_infer,
    flops=_flops,
    level="target",
)
