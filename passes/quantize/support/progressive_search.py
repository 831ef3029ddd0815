"""Search for the parameters of quantizers, coarse to fine, several candidates at a time (AdaLog's FPCS).

All candidates of a coarse grid are tried; around the best few, neighbours at half the distance are, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

__all__ = ["progressive_search"]

_KEPT = 3
_STEPS = 6


def progressive_search(
    loss: Callable[[torch.Tensor], torch.Tensor], problems: int, grid: Sequence[int]
) -> torch.Tensor:
    """Return the parameters of least loss found, float64 ``[P, D]``, each in [0, 1].

    Wu et al., AdaLog, arXiv 2407.12951, section 3.3.  The origin is a candidate, so that nothing is worse than it.

    Args:
        loss: Of one candidate for each problem, ``[P, D]``: ``[P]``.
        problems: P, searched side by side.
        grid: How many coarse values each of the D parameters has.

    """
    axes = [torch.arange(count, dtype=torch.float64) / max(count - 1, 1) for count in grid]
    coarse = torch.cartesian_prod(*axes).reshape(-1, len(grid))
    tried = coarse.unsqueeze(1).expand(-1, problems, -1)
    kept, losses = _best(tried, _losses(loss, tried))
    distance = torch.tensor([1 / max(count - 1, 1) for count in grid], dtype=torch.float64)
    offsets = [offset for offset in itertools.product((-1.0, 0.0, 1.0), repeat=len(grid)) if any(offset)]
    for _ in range(_STEPS):
        distance = distance / 2
        moves = torch.tensor(offsets, dtype=torch.float64) * distance
        near = (kept.unsqueeze(1) + moves[:, None]).flatten(0, 1).clamp(0, 1)
        kept, losses = _best(torch.cat((kept, near)), torch.cat((losses, _losses(loss, near))))
    return kept[0]


def _losses(loss: Callable[[torch.Tensor], torch.Tensor], tried: torch.Tensor) -> torch.Tensor:
    return torch.stack([loss(candidate) for candidate in tried])


def _best(tried: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best candidates of each problem, best first, and their losses: ``[K, P, D]`` and ``[K, P]``."""
    order = losses.argsort(dim=0, stable=True)[:_KEPT]
    return tried.gather(0, order.unsqueeze(2).expand(-1, -1, tried.shape[2])), losses.gather(0, order)
