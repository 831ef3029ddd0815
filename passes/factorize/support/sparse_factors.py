"""A weight as a sparse matrix times a small dense one: matching pursuit and least squares in turn (DSFormer).

    W ~ C D,    C [O, M] with exactly K entries in each row, D [M, I]

In the metric of the layer's inputs, with S S^T = E[x x^T]: rows t of W S are sums of K of the M rows of D S.  Given D,
each row's entries are found by orthogonal matching pursuit, several at a time (Wang et al., gOMP, arXiv 1111.6664);
given C, D is a least-squares problem (the method of optimal directions, Engan et al., ICASSP 1999).  D begins as the
leading right singular vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xformopt.kernels.packing import PERIODS, pack, packed_size

__all__ = ["SparseFactors", "entries_within", "fit_factors", "place_bits"]

# passes over the entries of a row, in each of which so many more of them are chosen
_ROUNDS = 8
_TINY = 1e-12


@dataclass(frozen=True)
class SparseFactors:
    """``weight ~ scatter(places, values) basis``.

    Attributes:
        basis: D, float64 ``[M, I]``.
        places: Which of its rows each output takes, int64 ``[O, K]``, distinct.
        values: How much of each, float64 ``[O, K]``.
        error: The squared error of the layer's output, as in the metric given.

    """

    basis: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor
    error: float

    @property
    def weight(self) -> torch.Tensor:
        """The product, float64 ``[O, I]``."""
        return _dense(self.places, self.values, len(self.basis)) @ self.basis

    def packed(self) -> tuple[torch.Tensor, int]:
        """Return the places as ``xf.sparse_factor_linear`` stores them, and the bits of each."""
        bits = place_bits(len(self.basis))
        return pack(self.places.to(torch.uint8), bits).contiguous(), bits


def place_bits(vectors: int) -> int:
    """Return the bits of the number of one of so many vectors, at most 256."""
    return next(bits for bits in sorted(PERIODS) if 2**bits >= vectors)


def entries_within(size: int, outputs: int, inputs: int, vectors: int, element: int) -> int:
    """Return K, how many entries a row may have so that all takes at most ``size`` bytes; 0 where there is no room.

    Args:
        size: Bytes for basis, entries and their places.
        outputs: O.
        inputs: I.
        vectors: M.
        element: Bytes of one number.

    """
    left = size - element * vectors * inputs
    entries = min(vectors, int(left / outputs / (element + place_bits(vectors) / 8)))
    while entries > 0 and outputs * (element * entries + packed_size(entries, place_bits(vectors))) > left:
        entries -= 1
    return max(entries, 0)


def fit_factors(
    weight: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    vectors: int,
    entries: int,
    iterations: int,
    start: torch.Tensor | None = None,
) -> SparseFactors:
    """Fit sparse and dense factor in turn.

    Args:
        weight: ``[O, I]``.
        factor: S, lower triangular ``[I, I]``; None for the plain metric.
        vectors: M, at most I.
        entries: K, at most M.
        iterations: How often the dense factor is fitted.
        start: Where it begins, ``[M, I]``; None for the leading singular vectors.

    """
    target = weight.double() if factor is None else weight.double() @ factor
    if start is None:
        basis = _leading(target, vectors)
    else:
        basis = _normalized(start.double() if factor is None else start.double() @ factor)
    places, values = _pursue(target, basis, entries)
    for _ in range(iterations):
        basis = _normalized(_least_squares(target, places, values, basis))
        places, values = _pursue(target, basis, entries)
    error = float((_dense(places, values, vectors) @ basis - target).square().sum())
    if factor is not None:
        basis = torch.linalg.solve_triangular(factor, basis, upper=False, left=False)
    return SparseFactors(basis, places, values, error)


def _leading(target: torch.Tensor, vectors: int) -> torch.Tensor:
    """Return the leading right singular vectors; where there are fewer, unit vectors fill up."""
    right = torch.linalg.svd(target, full_matrices=False).Vh[:vectors]
    return torch.cat([right, torch.eye(target.shape[1], dtype=target.dtype)[: vectors - len(right)]])


def _normalized(basis: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = basis.norm(dim=1, keepdim=True)
    return basis / norms.clamp(min=_TINY)


def _pursue(target: torch.Tensor, basis: torch.Tensor, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the entries of every row by what is left of it, and refit all that are chosen each time."""
    rows, count = len(target), len(basis)
    gram, projected = basis @ basis.t(), target @ basis.t()
    left = projected.clone()
    places = torch.empty(rows, 0, dtype=torch.int64)
    values = torch.empty(rows, 0, dtype=target.dtype)
    taken = torch.zeros(rows, count, dtype=torch.bool)
    for done in range(_ROUNDS):
        more = entries * (done + 1) // _ROUNDS - entries * done // _ROUNDS
        if not more:
            continue
        best = left.abs().masked_fill(taken, -1.0).topk(more, 1).indices
        taken.scatter_(1, best, True)
        places = torch.cat([places, best], 1)
        inner = gram[places.unsqueeze(2), places.unsqueeze(1)]  # [O, n, n]
        inner.diagonal(dim1=1, dim2=2).add_(_TINY + 1e-9)
        values = torch.linalg.solve(inner, projected.gather(1, places))
        left = projected - _dense(places, values, count) @ gram
    return places, values


def _least_squares(
    target: torch.Tensor, places: torch.Tensor, values: torch.Tensor, basis: torch.Tensor
) -> torch.Tensor:
    """Return the dense factor that fits the entries best; rows that no output takes stay."""
    coefficients = _dense(places, values, len(basis))
    inner = coefficients.t() @ coefficients
    scale = inner.diagonal().mean().clamp(min=_TINY)
    # a little of the old basis keeps what the entries do not determine
    held = 1e-6 * scale * torch.eye(len(inner), dtype=inner.dtype)
    found: torch.Tensor = torch.linalg.solve(inner + held, coefficients.t() @ target + held @ basis)
    return found


def _dense(places: torch.Tensor, values: torch.Tensor, vectors: int) -> torch.Tensor:
    return values.new_zeros(len(values), vectors).scatter(1, places, values)
