"""Move outlier channels from activations into weights, so that both are easier to quantize (SmoothQuant).

    norm(x; g, c) W^T + b    ->    norm(x; g / s, c / s) (W diag(s))^T + b,    s_j = max|X_j|^a / max|W_j|^(1 - a)

X is the norm's output on calibration data, W what its readers multiply it with (the largest entry over all of them).
Where no norm can take the scale, because a residual or an activation function lies between, it may be multiplied on:

    x W^T + b    ->    (x * 1/s) (W diag(s))^T + b

which costs a pass over the activations, and is done only where the error is expected to be more than 3% of the layer's
output, and its square to fall by half.

The exponent may be searched: the error expected of 8-bit codes is that of rounding, D^2 / 12 for a step of D, once for
the activations (one range for all) and once for the weights (one for each row), as both reach the layer's output.

**Exact**: the same function up to the rounding of the new parameters; needs calibration data.  Run it after the passes
that fold and fuse norms, and before one that quantizes linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xformopt.observers import Moments, observe_moments
from xformopt.passes.quantize.support.channel_scaling import linear_inputs, multiplying_rule, norm_outputs, scaling_rule
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Reject, Rule

__all__ = ["SmoothOutliers", "expected_error", "smoothing_scale"]

# channels whose activations or weights are smaller than that keep their scale
_SMALLEST = 1e-5
_EXPONENTS = tuple(step / 20 for step in range(4, 20))
# a multiplication of its own is for errors above this share of the output, and must leave at most this share of theirs
_NOTICEABLE, _WORTHWHILE = 0.03, 0.5


@dataclass(frozen=True)
class SmoothOutliers(RewritePass):
    """Scale channels in front of linear layers, so that activations and weights are both easy to quantize.

    Attributes:
        alpha: How much of the range moves into the weights: 0 nothing of the activations', 1 all of it.
        search: Whether to choose alpha for each value instead, by the expected error of 8-bit codes.
        multiply: Whether to multiply where no norm can take the scale and it pays.

    """

    alpha: float = 0.5
    search: bool = False
    multiply: bool = False

    sources: ClassVar[tuple[str, ...]] = ("Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], but is {self.alpha}")

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Calibrate what linear layers read; return the rule that fires at norms, and the one that multiplies."""
        norms = norm_outputs(program)
        inputs = linear_inputs(program) if self.multiply else {}
        if not norms and not inputs:
            return ()
        seen = observe_moments(program, context.calibration, {*norms, *inputs.values()}, progress=context.progress)

        def choose(name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor | Reject:
            return self._scale(seen[name], torch.cat([weight.double() for weight in weights]))

        def choose_worthwhile(name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor | Reject:
            joined = torch.cat([weight.double() for weight in weights])
            error = expected_error(torch.ones_like(seen[name].high), seen[name], joined)
            share = math.sqrt(error / float((joined.square() @ seen[name].mean_square).sum()))
            if share < _NOTICEABLE:
                return Reject(f"its expected error is {share:.1%} of its output: not worth a multiplication")
            scale = self._scale(seen[name], joined)
            if isinstance(scale, Reject):
                return scale
            left = expected_error(scale, seen[name], joined) / error
            if left > _WORTHWHILE:
                return Reject(f"{left:.0%} of the expected squared error would be left: not worth a multiplication")
            return scale

        at_norms = scaling_rule(norms, choose)
        return (at_norms, multiplying_rule(inputs, choose_worthwhile)) if self.multiply else (at_norms,)

    def _scale(self, seen: Moments, weight: torch.Tensor) -> torch.Tensor | Reject:
        if not self.search:
            return smoothing_scale(seen, weight, self.alpha)
        scales = [torch.ones_like(seen.high), *(smoothing_scale(seen, weight, alpha) for alpha in _EXPONENTS)]
        best = min(scales, key=lambda scale: expected_error(scale, seen, weight))
        return Reject("no scale is expected to lose less") if best is scales[0] else best


def smoothing_scale(seen: Moments, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return s ``[I]`` for the weight ``[O, I]`` of all readers."""
    activations, columns = torch.maximum(seen.low.abs(), seen.high.abs()), weight.abs().amax(0)
    scale = activations**alpha / columns ** (1 - alpha)
    return torch.where((activations > _SMALLEST) & (columns > _SMALLEST), scale, torch.ones_like(scale))


def expected_error(scale: torch.Tensor, seen: Moments, weight: torch.Tensor) -> float:
    """Return the squared error of a position's outputs that rounding to 8 bits leaves under the scale ``[I]``."""
    low, high = (seen.low / scale).amin().clamp(max=0), (seen.high / scale).amax().clamp(min=0)
    scaled = weight * scale
    step = (high - low) / 255
    rows = scaled.abs().amax(1) / 127
    of_activations = step.square() * scaled.square().sum()
    of_weights = rows.square().sum() * (seen.mean_square / scale.square()).sum()
    return float(of_activations + of_weights) / 12
