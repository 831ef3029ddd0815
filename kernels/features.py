"""Feature maps of linear attention: what is done to queries and keys so that their product is a weight."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

__all__ = ["FEATURES", "PROJECTED", "feature_map", "feature_width"]

FEATURES = ("elu", "given", "positive", "hedgehog")
# those with a projection
PROJECTED = ("positive", "hedgehog")


def feature_map(x: torch.Tensor, feature: str, projection: torch.Tensor | None) -> torch.Tensor:
    """Return the features of queries or keys.

    Args:
        x: ``[B, heads, T, D]``; of any shape where there is no projection.
        feature: ``elu``: ``elu(x) + 1`` (arXiv 2006.16236).  ``given``: x itself.  ``positive``: Performer's random
            features, ``exp(x W - |x|^2 / 2) / sqrt(m)``, whose products estimate ``exp(q . k)`` where the columns of W
            are drawn from a normal distribution (arXiv 2009.14794; without a maximum taken off, which a recurrence does
            not know in advance).  ``hedgehog``: ``[softmax(x W), softmax(-x W)]`` with a learned W (arXiv 2402.04347).
        projection: The W of each head, ``[heads, D, m]``, of the last two.

    Returns:
        ``[B, heads, T, F]``, or the shape of ``x``.

    """
    if feature == "given":
        return x
    if feature == "elu":
        return functional.elu(x) + 1
    assert projection is not None, f"the feature map {feature} has a projection"
    projected = x @ projection
    if feature == "positive":
        exponents: torch.Tensor = projected - x.square().sum(-1, keepdim=True) / 2
        return exponents.exp() / math.sqrt(projection.shape[2])
    return torch.cat((projected.softmax(-1), (-projected).softmax(-1)), -1)


def feature_width(feature: str, depth: int, projection: torch.Tensor | None) -> int:
    """Return how many features a head of ``depth`` channels has."""
    if projection is None:
        return depth
    return projection.shape[2] * (2 if feature == "hedgehog" else 1)
