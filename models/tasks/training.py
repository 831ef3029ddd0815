"""The one training loop of the trained models: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), a linear warm-up
and a half cosine after it, gradients clipped; the same weights on every run of the same machine.

Sequence models, which have minutes for what others give days, may ask for Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/) on the matrices of hidden layers, for a constant rate with a linear fall at
the end, for products in bfloat16, and for compilation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

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
        muon: Whether Muon moves the matrices of all linear layers but the last; ``betas`` are then those of the rest.
        cooldown: Share of the steps, at the end, in which the rate falls linearly from its highest; None: a half cosine
            falls from the warm-up on.
        bfloat16: Whether matrix products are taken in bfloat16; weights and their updates stay as they are.
        compiled: Whether to compile the module first, which pays where most steps have batches of one shape.

    """

    steps: int
    rate: float
    warmup: float = 0.1
    decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    seed: int = 0
    muon: bool = False
    cooldown: float | None = None
    bfloat16: bool = False
    compiled: bool = False

    def factor(self, step: int) -> float:
        """Return the share of the highest rate that ``step`` gets."""
        rising = max(round(self.steps * self.warmup), 1)
        if step < rising:
            return (step + 1) / rising
        if self.cooldown is not None:
            return min((self.steps - step) / (self.steps * self.cooldown), 1.0)
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
    optimizers = _optimizers(module, schedule)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor) for optimizer in optimizers]
    module.train().requires_grad_(True)
    called = cast(nn.Module, torch.compile(module)) if schedule.compiled else module
    mean = 0.0
    for step in range(schedule.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
            value = loss(called, generator, step / schedule.steps)
        module.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), schedule.clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        mean = float(value.detach()) if step == 0 else 0.98 * mean + 0.02 * float(value.detach())
        progress(f"training, loss {mean:.3f}", step + 1, schedule.steps)
    module.eval().requires_grad_(False)


def _optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Return AdamW over all weights, or Muon over the matrices of hidden layers and AdamW over the rest."""
    rest = list(module.parameters())
    found: list[torch.optim.Optimizer] = []
    if schedule.muon:
        # the rows of embeddings and of the last layer each stand for one token or class: nothing to make orthogonal
        matrices = [part.weight for part in module.modules() if isinstance(part, nn.Linear)][:-1]
        chosen = {id(weight) for weight in matrices}
        rest = [weight for weight in rest if id(weight) not in chosen]
        found.append(
            torch.optim.Muon(matrices, lr=schedule.rate, weight_decay=schedule.decay, adjust_lr_fn="match_rms_adamw")
        )
    return [*found, torch.optim.AdamW(_groups(rest, schedule.decay), lr=schedule.rate, betas=schedule.betas)]


def _groups(parameters: list[nn.Parameter], decay: float) -> list[dict[str, object]]:
    """Decay matrices; biases, gains and other vectors are left alone."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
