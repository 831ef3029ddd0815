"""A weight as a sum of products of vectors, the largest first: truncated SVD, plain or in the metric of its inputs.

With G = E[x x^T] over what the layer reads and its Cholesky factor S, G = S S^T:

    E |W x - W' x|^2 = |(W - W') S|_F^2,    W S = U diag(s) V^T    ->    W'_r = U_r diag(s_r) V_r^T S^-1

is the best matrix of rank r, and its squared error is the sum of the other s_i^2 (activation-aware SVD; Yuan et al.,
ASVD, arXiv 2312.05821; Wang et al., SVD-LLM, arXiv 2403.07378, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LowRank", "break_even", "decompose", "whitening"]

# part of the mean of G's diagonal that is added to it, so that directions the data lacks keep a little weight
_DAMPING = 1e-3


@dataclass(frozen=True)
class LowRank:
    """All terms of a decomposition of a weight ``[O, I]``, the largest first; float64.

    Attributes:
        left: ``[O, R]``.
        values: ``[R]``, falling.
        right: ``[R, I]``.

    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    @property
    def full(self) -> int:
        """The rank at which nothing is lost."""
        return len(self.values)

    def lost(self, rank: int) -> float:
        """Return the squared error of the layer's output that the terms behind ``rank`` leave."""
        return float(self.values[rank:].square().sum())

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``down [r, I]`` and ``up [O, r]``, of similar size, whose product ``up down`` is the weight."""
        root = self.values[:rank].sqrt()
        return root.unsqueeze(1) * self.right[:rank], self.left[:, :rank] * root


def decompose(weight: torch.Tensor, factor: torch.Tensor | None) -> LowRank:
    """Decompose a weight ``[O, I]`` in the metric of a lower triangular ``factor [I, I]``, or in the plain one."""
    exact = weight.double()
    if factor is None:
        return LowRank(*torch.linalg.svd(exact, full_matrices=False))
    left, values, right = torch.linalg.svd(exact @ factor, full_matrices=False)
    return LowRank(left, values, torch.linalg.solve_triangular(factor, right, upper=False, left=False))


def whitening(gram: torch.Tensor, count: int) -> torch.Tensor:
    """Return S, lower triangular, from ``X^T X`` over ``count`` positions, damped."""
    mean = gram / count
    damping = _DAMPING * mean.diagonal().mean()
    factor: torch.Tensor = torch.linalg.cholesky(mean + damping * torch.eye(len(mean), dtype=mean.dtype))
    return factor


def break_even(outputs: int, inputs: int) -> float:
    """Return the rank from which on two layers are no smaller than the one: ``mn / (m + n)``."""
    return outputs * inputs / (outputs + inputs)
