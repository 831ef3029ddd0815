"""The definition of layer normalization."""

from __future__ import annotations

import torch

__all__ = ["layer_norm"]


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    groups: int = 1,
) -> torch.Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis (Ba et al., arXiv 1607.06450).

    Args:
        x: ``[..., C]``.
        weight: ``[C / groups]``, shared by the groups.
        bias: ``[C / groups]``.
        eps: Added to the (biased) variance.
        groups: Equal parts of the last axis that are normalized apart: the heads of a norm on queries or keys.

    Returns:
        ``[..., C]``.

    """
    parts = x.unflatten(-1, (groups, -1))
    normalized = torch.nn.functional.layer_norm(parts, parts.shape[-1:], weight, bias, eps)
    return normalized.flatten(-2)
