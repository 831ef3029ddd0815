"""Triton kernel of ``xf.linear_attention``: its causal form is a recurrence without decay."""

from __future__ import annotations

import torch

from xformopt.kernels.features import feature_map, feature_width
from xformopt.kernels.retention.triton import decayed, refusal
from xformopt.kernels.triton_form import Kernel, Plan, Verdict

__all__ = ["KERNEL"]


def _accepts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Verdict:
    if not causal:
        return "it is not causal: two products of matrices, which torch computes as well"
    return refusal(q, k, v, widths=(feature_width(feature, q.shape[2] // heads, projection), v.shape[2] // heads))


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    *,
    heads: int,
    feature: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Plan:
    q, k = (_features(x, feature, projection, heads) for x in (q, k))
    k = k if key_mask is None else k.masked_fill(~key_mask.unsqueeze(2), 0.0)
    return decayed(q, k, v, None, heads=heads, eps=eps if normalize else None)


def _features(x: torch.Tensor, feature: str, projection: torch.Tensor | None, heads: int) -> torch.Tensor:
    """Return features as they lie in memory, ``[B, T, heads * F]``; elementwise maps need no heads."""
    if projection is None:
        return feature_map(x, feature, None)
    parts: torch.Tensor = x.unflatten(2, (heads, -1))
    return feature_map(parts.transpose(1, 2), feature, projection).transpose(1, 2).flatten(2)


KERNEL = Kernel(_plan, _accepts)
