"""Schema, shape rule and cost of ``xf.mra_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.chunks import chunk_count
from xformopt.kernels.definition import Operator
from xformopt.kernels.mra_attention.reference import mra_attention, refined_blocks

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    block: int,
    keep: float,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(q.shape[1] == k.shape[1], lambda: "multi-resolution attention has one key for each query")
    torch._check(block >= 1, lambda: "a block has at least one token")
    torch._check(0 < keep <= 1, lambda: "the share of blocks must be above 0 and at most 1")
    if bias is not None:
        torch._check(bias.dim() == 4, lambda: "the bias must have four axes: batch, heads, queries, keys")
        torch._check(bias.shape[2] == q.shape[1], lambda: "the bias and q disagree on the queries")
        torch._check(bias.shape[3] == k.shape[1], lambda: "the bias and k disagree on the keys")
    return v.new_empty(v.shape)


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
    heads: int,
    block: int,
    keep: float,
    causal: bool = False,
    coarse: bool = True,
    **__: Any,
) -> Any:
    """Both products of the blocks that are refined, their scores, and the product with the means of values."""
    N = chunk_count(q.shape[1], block)
    fine = refined_blocks(N, keep, causal=causal) * block * block * (q.shape[2] + v.shape[2])
    means = N * N * (q.shape[2] + (v.shape[2] if coarse else 0))
    return 2 * q.shape[0] * (fine + means)


OPERATOR = Operator(
    name="mra_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, *, int heads, float scale, "
        "int block, float keep, bool causal=False, bool coarse=True) -> Tensor"
    ),
    reference=mra_attention,
    infer=_infer,
    flops=_flops,
)
