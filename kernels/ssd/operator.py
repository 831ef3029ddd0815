"""Schema, shape rule and cost of ``xf.ssd``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import CHUNK, chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.ssd.reference import ssd

__all__ = ["OPERATOR"]


def _infer(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    heads: int,
    groups: int = 1,
    causal: bool = True,
) -> torch.Tensor:
    torch._check(b.shape[2] == c.shape[2], lambda: "b and c disagree on the size of a state")
    torch._check(dt.shape[2] == heads, lambda: "there is not one step size for each head")
    return x.new_empty(x.shape)


def _flops(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *_: Any,
    heads: int,
    groups: int = 1,
    causal: bool = True,
    **__: Any,
) -> Any:
    """Chunkwise: products of b and c for each group, with the inputs for each head; writing and reading the states.

    Where not causal, only the last.
    """
    N, P = b.shape[2] // groups, x.shape[2] // heads
    if not causal:
        return 4 * x.shape[0] * x.shape[1] * heads * N * P
    tokens = x.shape[0] * chunk_count(x.shape[1]) * CHUNK
    return 2 * tokens * (groups * CHUNK * N + heads * (CHUNK * P + 2 * N * P))


OPERATOR = Operator(
    name="ssd",
    schema=(
        "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d=None, *, int heads, int groups=1, "
        "bool causal=True) -> Tensor"
    ),
    reference=ssd,
    infer=_infer,
    flops=_flops,
    needs_float32=True,
)
