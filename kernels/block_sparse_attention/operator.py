"""Schema, shape rule and cost of ``xf.block_sparse_attention``."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.block_sparse_attention.reference import block_sparse_attention
from xformopt.kernels.definition import Operator

__all__ = ["OPERATOR"]


def _infer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    block: int,
    causal: bool = False,
    **_: Any,
) -> torch.Tensor:
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k disagree on the head width")
    torch._check(block_mask.dtype == torch.bool, lambda: "the block mask must be bool")
    torch._check(block_mask.shape[0] in (1, heads), lambda: "there is not one block mask for all heads or for each")
    torch._check(q.shape[1] <= block_mask.shape[1] * block, lambda: "there are more queries than the block mask covers")
    torch._check(k.shape[1] <= block_mask.shape[2] * block, lambda: "there are more keys than the block mask covers")
    torch._check(not causal or q.shape[1] == k.shape[1], lambda: "causal attention has one key for each query")
    if bias is not None:
        torch._check(bias.dim() == 4, lambda: "the bias must have four axes: batch, heads, queries, keys")
        torch._check(bias.shape[2] == q.shape[1], lambda: "the bias and q disagree on the queries")
        torch._check(bias.shape[3] == k.shape[1], lambda: "the bias and k disagree on the keys")
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    *_: Any,
    heads: int,
    block: int,
    **__: Any,
) -> Any:
    """Both products over all pairs of each block that is kept; all blocks where the mask has no values to count."""
    has_values = type(block_mask) is torch.Tensor and block_mask.device.type != "meta"
    kept = int(block_mask.sum()) if has_values else block_mask.numel()
    blocks = kept if block_mask.shape[0] == heads else kept * heads
    return 2 * q.shape[0] * blocks * block * block * ((q.shape[2] + v.shape[2]) // heads)


OPERATOR = Operator(
    name="block_sparse_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor block_mask, Tensor? key_mask=None, Tensor? bias=None, *, "
        "int heads, float scale, int block, bool causal=False) -> Tensor"
    ),
    reference=block_sparse_attention,
    infer=_infer,
    flops=_flops,
)
