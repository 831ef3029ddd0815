"""The one training loop of the trained models: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), a linear warm-up
and a half cosine after it, gradients clipped; the same weights on every run of the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from xformopt.models.tasks.task import Progress

__all__ = ["Loss", "Schedule", "fit"]

# one step's loss, from the module and a generator that draws the batch; the third argument is the share of steps done
Loss = Callable[[nn.Module, torch.Generator, float], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        steps: Updates of the weights.
        rate: The learning rate at its highest.
        warmup: Share of the steps in which the rate rises from nothing.
        decay: Weight decay, of weights with two axes or more.
        betas: Of AdamW's moments.
        clip: Largest norm of the gradient.
        seed: Of the batches drawn.

    """

    steps: int
    rate: float
    warmup: float = 0.1
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    seed: int = 0

    def factor(self, step: int) -> float:
        """Return the share of the highest rate that ``step`` gets."""
        rising = max(round(self.steps * self.warmup), 1)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(self.steps - rising, 1)))


def fit(module: nn.Module, loss: Loss, schedule: Schedule, progress: Progress) -> None:
    """Train a module in place, and leave it in inference mode.

    Args:
        module: With fresh weights.
        loss: Draws a batch and returns its loss.
        schedule: How long and how fast.
        progress: Called with (what, done, total) after every step; ``what`` holds the running mean of the loss.

    """
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW(_groups(module, schedule.decay), lr=schedule.rate, betas=schedule.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    module.train().requires_grad_(True)
    mean = 0.0
    for step in range(schedule.steps):
        value = loss(module, generator, step / schedule.steps)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), schedule.clip)
        optimizer.step()
        scheduler.step()
        mean = float(value.detach()) if step == 0 else 0.98 * mean + 0.02 * float(value.detach())
        progress(f"training, loss {mean:.3f}", step + 1, schedule.steps)
    module.eval().requires_grad_(False)


def _groups(module: nn.Module, decay: float) -> list[dict[str, object]]:
    """Decay matrices; biases, gains and other vectors are left alone."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
