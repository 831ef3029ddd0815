"""Fitting the tables of ``xf.memory_linear`` to what a linear layer answers.

    T, b' = argmin  sum_n |sum_k p(z_nk) T_k[h(z_nk)] + b' - y_n|^2  +  r |T - T0|^2

T0 is what the weight says of a row of signs s: ``W_k (s * mean |z_k|) / mean p``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from xformopt.kernels.memory_linear import hashed

__all__ = ["Tables", "fit_tables"]

# of the mean of |x|: which temperatures are tried
_TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
# rows that they are tried on; one of so many is held out
_TRIED, _HELD_OUT = 1024, 4


@dataclass(frozen=True)
class Tables:
    """What stands for one layer: the operands of ``xf.memory_linear``, float64.

    ``error`` is the squared error on rows held out, over that of zeros.
    """

    tables: torch.Tensor
    bias: torch.Tensor
    temperature: float
    error: float


def fit_tables(
    x: torch.Tensor,
    wanted: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    bits: int,
    ridge: float,
    seed: int,
) -> Tables:
    """Fit tables at the temperature that errs least.

    Args:
        x: Rows of the layer's input, ``[N, K * bits]``.
        wanted: What it is to answer, ``[N, O]``.
        weight: The layer's own, ``[O, K * bits]``.
        bias: ``[O]``.
        bits: Channels of a part.
        ridge: r, over the mean square of a feature.
        seed: Of which rows are held out.

    """
    x, wanted, weight = x.double(), wanted.double(), weight.double()
    start = weight.new_zeros(len(weight)) if bias is None else bias.double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:_TRIED]
    held, kept = order[: len(order) // _HELD_OUT], order[len(order) // _HELD_OUT :]
    size = wanted[held].square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    magnitude = float(x.abs().mean()) or 1.0
    tried = []
    for factor in _TEMPERATURES:
        fit = _Fit(bits, factor * magnitude, ridge, weight, start)
        missed = fit.answers(x[held], fit.solve(x[kept], wanted[kept])) - wanted[held]
        tried.append((float(missed.square().sum() / size), factor))
    error, factor = min(tried)
    fit = _Fit(bits, factor * magnitude, ridge, weight, start)
    solved = fit.solve(x, wanted)
    return Tables(solved[:-1].unflatten(0, (-1, 2**bits)).contiguous(), solved[-1], fit.temperature, error)


@dataclass(frozen=True)
class _Fit:
    """The least squares of one layer's tables at one temperature; they end with a row for the bias."""

    bits: int
    temperature: float
    ridge: float
    weight: torch.Tensor
    bias: torch.Tensor

    def solve(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return the rows of all tables, ``[K * 2^bits + 1, O]``."""
        features, start = self._features(x), self._start(x)
        gram = features.t() @ features
        held = self.ridge * float(gram.diagonal().mean())
        root = torch.linalg.cholesky(gram + held * torch.eye(len(gram), dtype=gram.dtype))
        return start + torch.cholesky_solve(features.t() @ (wanted - features @ start), root)

    def answers(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return what the tables give."""
        return self._features(x) @ rows

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """Return p at the place of each table, 0 elsewhere, and a one for the bias, ``[N, K * 2^bits + 1]``."""
        places, sureness = self._hashed(x)
        found = x.new_zeros(len(x), places.shape[1], 2**self.bits)
        found.scatter_(2, places.unsqueeze(2), sureness.unsqueeze(2))
        return functional.pad(found.flatten(1), (0, 1), value=1.0)

    def _start(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the weight says of every place: its product with signs of the usual size."""
        _, sureness = self._hashed(x)
        sizes = x.abs().mean(0).unflatten(0, (-1, self.bits))  # [K, bits]
        signs = (torch.arange(2**self.bits).unsqueeze(1) >> torch.arange(self.bits) & 1) * 2.0 - 1.0
        parts = self.weight.unflatten(1, (-1, self.bits))  # [O, K, bits]
        rows = torch.einsum("sb,kb,okb->kso", signs.to(x), sizes, parts) / sureness.mean(0)[:, None, None]
        return torch.cat((rows.flatten(0, 1), self.bias.unsqueeze(0)))

    def _hashed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hashed(x, x.shape[1] // self.bits, self.temperature)
