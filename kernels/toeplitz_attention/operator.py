"""Schema, shape rule and cost of ``xf.toeplitz_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.features import feature_width
from xformopt.kernels.toeplitz_attention.reference import toeplitz_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "there is not one key for each query")
    torch._check(bias.shape[0] in (1, heads), lambda: "there is not one bias for all heads or for each")
    torch._check(bias.shape[1] % 2 == 1, lambda: "the bias has no middle, for the distance 0")
    torch._check(2 * q.shape[1] - 1 <= bias.shape[1], lambda: "there are more tokens than the bias has distances")
    if projection is not None:
        shape = (heads, q.shape[2] // heads)
        torch._check(projection.shape[:2] == shape, lambda: "projection and q disagree on the heads or their width")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    **_: Any,
) -> Any:
    """Features of queries and keys, and both products over all pairs."""
    width = feature_width("positive", q.shape[2] // heads, projection)
    projected = 0 if projection is None else 4 * q.numel() * width
    return projected + 2 * q.shape[0] * q.shape[1] * k.shape[1] * (heads * width + v.shape[2])


OPERATOR = Operator(
    name="toeplitz_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor? key_mask=None, Tensor? projection=None, *, int heads, "
        "bool causal=False) -> Tensor"
    ),
    reference=toeplitz_attention,
    infer=_infer,
    flops=_flops,
)
