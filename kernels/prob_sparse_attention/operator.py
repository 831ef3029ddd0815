"""Schema, shape rule and cost of ``xf.prob_sparse_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.definition import Operator
from xformopt.kernels.prob_sparse_attention.reference import active_queries, prob_sparse_attention

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sample: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    factor: float,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "ProbSparse attention has one key for each query")
    torch._check(sample.dim() == 1 and sample.shape[0] > 0, lambda: "the sample must be a list of places")
    torch._check(factor > 0, lambda: "the factor must be positive")
    if bias is not None:
        torch._check(bias.dim() == 4, lambda: "the bias must have four axes: batch, heads, queries, keys")
        torch._check(bias.shape[2] == q.shape[1], lambda: "the bias and q disagree on the queries")
        torch._check(bias.shape[3] == k.shape[1], lambda: "the bias and k disagree on the keys")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sample: torch.Tensor, *_: Any, factor: float, **__: Any
) -> Any:
    """Both products of the queries that attend, and the product with the keys that rate them."""
    B, T, width = q.shape
    attended = active_queries(T, factor) * T * (width + v.shape[2])
    return 2 * B * (attended + T * sample.shape[0] * width)


OPERATOR = Operator(
    name="prob_sparse_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor sample, Tensor? key_mask=None, Tensor? bias=None, *, int heads, "
        "float scale, float factor, bool causal=False) -> Tensor"
    ),
    reference=prob_sparse_attention,
    infer=_infer,
    flops=_flops,
)
