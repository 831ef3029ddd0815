"""Schema, shape rule and cost of ``xf.xca``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.xca.reference import xca

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    temperature: torch.Tensor,
    *_: Any,
    heads: int,
    top: int = 0,
    **__: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2] == v.shape[2], lambda: "q, k and v disagree on the channels")
    torch._check(q.shape[1] == k.shape[1] == v.shape[1], lambda: "q, k and v disagree on the tokens")
    torch._check(temperature.shape[0] == heads, lambda: "there is not one temperature for each head")
    torch._check(0 <= top <= q.shape[2] // heads, lambda: "a head has fewer channels than the top ones asked for")
    return v.new_empty(v.shape)


def _flops(q: torch.Tensor, *_: Any, heads: int, **__: Any) -> Any:
    """Channels with channels over all tokens, twice, and the lengths of channels; the top ones save none of it."""
    return 4 * q.numel() * (q.shape[2] // heads) + 6 * q.numel()


OPERATOR = Operator(
    name="xca",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor? key_mask=None, *, int heads, float eps=1e-12, "
        "int top=0) -> Tensor"
    ),
    reference=xca,
    infer=_infer,
    flops=_flops,
)
