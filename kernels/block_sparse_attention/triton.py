"""Triton kernel of ``xf.block_sparse_attention``."""

from __future__ import annotations

import torch

from xformopt.kernels.attention.triton import refusal, strides_of
from xformopt.kernels.triton_form import Kernel, Launch, Plan, Verdict, power_of_two, tiles

__all__ = ["KERNEL"]

# tokens of a block: what a tile may have of rows
_BLOCKS = (16, 32, 64, 128)


def _accepts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    causal: bool = False,
) -> Verdict:
    if block not in _BLOCKS:
        return f"its blocks have {block} tokens, not 16, 32, 64 or 128"
    return refusal(q, k, v, heads, heads)


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    block: int,
    causal: bool = False,
) -> Plan:
    from xformopt.kernels.triton_sparse_attention import block_sparse_forward

    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (B, T), S, D, E = q.shape[:2], k.shape[1], q.shape[2] // heads, v.shape[2] // heads
    out, spread = q.new_empty(B, T, heads * E), None if bias is None else bias.expand(B, heads, T, S)
    mask = block_mask.contiguous()
    arguments = {
        **{"q": q, "k": k, "v": v, "block_mask": mask, "bias": spread, "out": out},
        "key_mask": None if key_mask is None else key_mask.expand(B, S).contiguous(),
        **{"T": T, "S": S, "scale": scale, "columns": tiles(S, block)},
        **{"mask_head": 0 if mask.shape[0] == 1 else mask.stride(0), "mask_row": mask.stride(1)},
        **strides_of(q, k, v, spread),
    }
    is_large = q.dtype == torch.float32 or max(D, E) > 128
    constants = {
        **{"HEADS": heads, "D": D, "E": E, "RIGHT": 0 if causal else -1, "M": block},
        **{"N": min(block, 32 if is_large else 64), "WIDE_D": power_of_two(D), "WIDE_E": power_of_two(E)},
    }
    warps = 8 if block == 128 or is_large else 4
    return Plan((Launch(block_sparse_forward, (tiles(T, block), heads, B), arguments, constants, warps, 2),), out)


KERNEL = Kernel(_plan, _accepts)
