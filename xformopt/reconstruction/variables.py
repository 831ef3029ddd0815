"""What can be trained in place of a parameter.

The parameter itself, an update of low rank, its scale, or which way its values are rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

__all__ = ["Free", "LowRank", "Positive", "Rounding", "Variable"]

# the rectified sigmoid reaches beyond 0 and 1, so that it can settle there (Louizos et al., arXiv 1712.01312)
_STRETCH, _OFFSET = 1.2, -0.1
# how far a rounding variable can travel in all, in units of the sigmoid's argument, and in one step
_JOURNEY, _STRIDE = 40.0, 0.3


class Variable(ABC):
    """A trained tensor, and the parameter value that it stands for.

    Unless a kind says otherwise, the value itself is kept of the training.

    Attributes:
        leaf: What is trained.
        start: The value before training.

    """

    leaf: torch.Tensor

    def __init__(self, start: torch.Tensor, rate: float) -> None:
        self.start, self._rate = start, rate

    @abstractmethod
    def value(self) -> torch.Tensor:
        """Return the parameter's value while it is trained, differentiable in the leaf."""

    def result(self) -> torch.Tensor:
        """Return what is kept of the training."""
        return self.value().detach().clone()

    def untrained(self) -> torch.Tensor:
        """Return what would be kept without training."""
        return self.start.clone()

    def settled(self, result: torch.Tensor) -> torch.Tensor:
        """Return the parameter's value for a result."""
        return result

    def rate(self, iterations: int) -> float:
        """Return the learning rate for a training of so many steps."""
        return self._rate

    def penalty(self, beta: float) -> torch.Tensor | None:
        """Return the sum of what keeps values from settling, or None where nothing has to settle."""
        return None


class Free(Variable):
    """The parameter itself is trained."""

    def __init__(self, start: torch.Tensor, *, rate: float = 1e-3) -> None:
        super().__init__(start, rate)
        self.leaf = start.clone().requires_grad_()

    def value(self) -> torch.Tensor:
        """Return the value to compute with in training."""
        return self.leaf


class LowRank(Variable):
    """A matrix moves by a product of two thin ones (Hu et al., LoRA, arXiv 2106.09685).

    ``value = start + B A``, A ``[R, I]`` drawn from a normal distribution of deviation ``1 / sqrt(I)``, B ``[O, R]``
    started at zero.  The leaf is both, ``[R, I + O]``; the result is the sum.
    """

    def __init__(self, start: torch.Tensor, *, rank: int, seed: int = 0, rate: float = 1e-3) -> None:
        super().__init__(start, rate)
        rows, self.columns = start.shape
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(rank, self.columns, generator=generator, dtype=start.dtype) / self.columns**0.5
        self.leaf = torch.cat([first, start.new_zeros(rank, rows)], 1).requires_grad_()

    def value(self) -> torch.Tensor:
        """Return the value to compute with in training."""
        return self.start + self.leaf[:, self.columns :].t() @ self.leaf[:, : self.columns]


class Positive(Variable):
    """A scale is trained, in proportion to what it was: ``value = start * exp(leaf)``."""

    def __init__(self, start: torch.Tensor, *, rate: float = 2e-3) -> None:
        super().__init__(start, rate)
        self.leaf = torch.zeros_like(start).requires_grad_()

    def value(self) -> torch.Tensor:
        """Return the value to compute with in training."""
        return self.start * self.leaf.exp()


class Rounding(Variable):
    """Each value is rounded to its lower or upper neighbour, which of them is trained (AdaRound).

    ``value = low + (high - low) h(V)``, ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)``, started where the value is the
    unrounded one; ``penalty = sum(1 - |2h - 1|^beta)`` drives every h to 0 or 1 as beta falls (Nagel et al., arXiv
    2004.10568, equations 21 to 24).  Here a step of training moves V by up to ``40 / iterations`` (0.3 at most), so
    that a short training takes V as far as the 20,000 small steps of the paper.

    Where neighbours are not equally far apart, the leaf is ``V (high - low) / mean(high - low)``: what lies close
    together trains as fast as what lies far apart (the scale-aware rounding of FP4DiT, Chen et al., arXiv 2503.15465).

    The result is uint8: 1 where a value is rounded up.
    """

    def __init__(self, weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__(weight, _STRIDE)
        self.low, self.high, self.step = low, high, high - low
        fixed = self.step <= 0
        self.share = torch.where(fixed, 0.0, (weight - low) / self.step.masked_fill(fixed, 1)).clamp(0, 1)
        typical = self.step[~fixed].mean() if bool((~fixed).any()) else self.step.new_ones(())
        self.pace = torch.where(fixed, 1.0, self.step / typical)
        start = torch.logit((self.share - _OFFSET) / _STRETCH)
        self.leaf = (start * self.pace).requires_grad_()

    def soft(self) -> torch.Tensor:
        """Return h(V), how far each value is on its way up."""
        return (_STRETCH * torch.sigmoid(self.leaf / self.pace) + _OFFSET).clamp(0, 1)

    def value(self) -> torch.Tensor:
        """Return the value to compute with in training."""
        return self.low + self.step * self.soft()

    def penalty(self, beta: float) -> torch.Tensor:
        """Return the penalty of what is not rounded yet."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).sum()

    def result(self) -> torch.Tensor:
        """Return what is kept of the training."""
        return (self.soft().detach() >= 0.5).to(torch.uint8)

    def untrained(self) -> torch.Tensor:
        """Return what would be kept without it."""
        return (self.share >= 0.5).to(torch.uint8)

    def settled(self, result: torch.Tensor) -> torch.Tensor:
        """Return the value for a result."""
        return torch.where(result.bool(), self.high, self.low)

    def rate(self, iterations: int) -> float:
        """Return the learning rate."""
        return min(_STRIDE, _JOURNEY / iterations)
