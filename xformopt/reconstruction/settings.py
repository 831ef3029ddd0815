"""How blocks are trained: steps, time, rates, and what the result is judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Settings"]

# how often a training is judged on what is held out, and which share of a limited time that may take
_MOST_JUDGED, _FEWEST_JUDGED, _JUDGING = 10, 2, 0.2


@dataclass(frozen=True)
class Settings:
    """How blocks are trained.

    Attributes:
        iterations: Steps of each block, at most.
        minutes: What all blocks may take together; steps are reduced to what fits.  None: no limit.
        drop: The chance of an element to be left unquantized in a step.
        seed: Of what is random.
        warm_up: The share of the steps in which the rate rises to its full value.
        cosine: Whether the rate falls to 0 afterwards, as half a cosine.
        decay: Of AdamW, in every step ``value -= rate decay value``.
        clip: The norm that the gradient of all variables together is cut to; None: none.
        held_out: Batches that are not trained on.  Up to ten times in a training, less often where that takes more than
            a fifth of the minutes, the block is judged on them, and the best values are kept.  0: it is judged once,
            in the end, on what it was trained on.
        memory: Bytes of values between blocks that are held in memory; what is more goes to a temporary file.

    """

    iterations: int = 400
    minutes: float | None = None
    drop: float = 0.0
    seed: int = 0
    warm_up: float = 0.0
    cosine: bool = False
    decay: float = 0.0
    clip: float | None = None
    held_out: int = 0
    memory: int = 2 << 30

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, but is {self.iterations}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be positive, but is {self.minutes}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must lie in [0, 1), but is {self.drop}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must lie in [0, 1), but is {self.warm_up}")
        if self.decay < 0 or self.held_out < 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError("decay and held_out must not be negative, and clip must be positive")

    def judged(self, batches: int) -> tuple[int, ...]:
        """Return the numbers of the batches that are held out, at equal distances."""
        return tuple(int((index + 0.5) * batches / self.held_out) for index in range(self.held_out))

    def judgements(self, seconds: float | None, one: float) -> int:
        """Return how often a training of so many seconds is judged, where ``one`` judgement takes that many."""
        if not self.held_out:
            return 1
        if seconds is None:
            return _MOST_JUDGED
        return max(_FEWEST_JUDGED, min(_MOST_JUDGED, int(_JUDGING * seconds / max(one, 1e-9))))

    def rate(self, step: int, steps: int) -> float:
        """Return the share of the full learning rate in a step."""
        rising = self.warm_up * steps
        if step + 1 < rising:
            return (step + 1) / rising
        if not self.cosine:
            return 1.0
        return (1 + math.cos(math.pi * max(step - rising, 0) / max(steps - rising, 1))) / 2
