"""Triton kernel of ``xf.attention_packed``: no padding is read, computed or written."""

from __future__ import annotations

from typing import Any

import torch

from xformopt.kernels.attention.triton import forward, refusal, trial
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _accepts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, heads: int, kv_heads: int, **__: Any
) -> Verdict:
    return refusal(q, k, v, heads, kv_heads)


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
) -> Plan:
    """Blocks are dealt out to sequences on the GPU, so that no length is read back to the host."""
    lengths = {"offsets": offsets.contiguous(), "keys": None if keys is None else keys.contiguous()}
    right = 0 if causal else -1
    return forward(q, k, v, lengths, heads=heads, kv_heads=kv_heads, scale=scale, left=-1, right=right)


KERNEL = Kernel(_plan, _accepts, trial)
