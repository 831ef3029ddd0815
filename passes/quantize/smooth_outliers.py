"""Move outlier channels from activations into weights, so that both are easier to quantize (SmoothQuant).

    norm(x; g, c) W^T + b    ->    norm(x; g / s, c / s) (W diag(s))^T + b,    s_j = max|X_j|^a / max|W_j|^(1 - a)

X is the norm's output on calibration data, W what its readers multiply it with (the largest entry over all of them).

**Exact**: the same function up to the rounding of the new parameters; needs calibration data.  Run it after the passes
that fold and fuse norms, and before one that quantizes linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xformopt.observers import observe_ranges
from xformopt.passes.channel_scaling import norm_outputs, scaling_rule
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Rule

__all__ = ["SmoothOutliers"]

# channels whose activations or weights are smaller than that keep their scale
_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothOutliers(RewritePass):
    """Scale channels between norms and the linear layers behind them, so that both are easy to quantize.

    Attributes:
        alpha: How much of the range moves into the weights: 0 nothing of the activations', 1 all of it.

    """

    alpha: float = 0.5

    sources: ClassVar[tuple[str, ...]] = ("Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], but is {self.alpha}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Calibrate every norm's output; return the one rule, which fires at the norm."""
        wanted = norm_outputs(program)
        if not wanted:
            return ()
        ranges = observe_ranges(program, context.calibration, wanted, granularity="channel", progress=context.progress)

        def choose(name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor:
            activations = torch.maximum(ranges[name].low.abs(), ranges[name].high.abs())
            columns = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
            scale = activations**self.alpha / columns ** (1 - self.alpha)
            return torch.where((activations > _SMALLEST) & (columns > _SMALLEST), scale, torch.ones_like(scale))

        return (scaling_rule(wanted, choose),)
