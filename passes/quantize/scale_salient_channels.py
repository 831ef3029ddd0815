"""Enlarge the weights of channels that carry large activations, so that rounding harms them less (AWQ).

    norm(x; g, c) W^T + b    ->    norm(x; g / s, c / s) (W diag(s))^T + b,    s_j = (mean|X_j|)^a

X is the norm's output on calibration data.  The exponent a is searched, for each norm, such that the outputs of its
readers change least when W diag(s) is rounded in groups; s is divided by the root of its largest times its smallest.

**Exact**: the same function up to the rounding of the new parameters; needs calibration data.  Run it after the passes
that fold and fuse norms, and before ``quantize-weights`` with the same bits, group and symmetry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xformopt.passes.gram_matrices import Seen, gram_matrices
from xformopt.passes.quantize.support.channel_scaling import norm_outputs, scaling_rule
from xformopt.passes.quantize.support.quantization import check_groups, dequantized, quantize_groups
from xformopt.pipeline import Context, RewritePass
from xformopt.program import Program
from xformopt.rewrite import Reject, Rule

__all__ = ["ScaleSalientChannels"]

# exponents that are tried, as published: 0, 1/20, ..., 19/20
_GRID = 20
_SMALLEST = 1e-4


@dataclass(frozen=True)
class ScaleSalientChannels(RewritePass):
    """Scale channels between norms and linear layers, so that few-bit weights harm salient channels less.

    Attributes:
        bits: Of the codes that weights will be rounded to, 4 or 8.
        group: Neighbouring input channels that will share a scale: 16, 32, 64, 128 or 256.
        symmetric: Zero will be the middle code, instead of a code of each group's own.

    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False

    sources: ClassVar[tuple[str, ...]] = ("Lin et al., AWQ, arXiv 2306.00978, equations 4 and 5",)

    def __post_init__(self) -> None:
        check_groups(self.bits, self.group)

    def rules(self, program: Program, context: Context) -> Sequence[Rule]:
        """Look at the outputs of all norms on calibration data; return the one rule, which fires at the norm."""
        wanted = norm_outputs(program)
        if not wanted:
            return ()
        seen: dict[str, Seen] = {}
        for part in gram_matrices(program, context.calibration, wanted, context.progress):
            seen |= part

        def choose(name: str, weights: Sequence[torch.Tensor]) -> torch.Tensor | Reject:
            columns = weights[0].shape[1]
            if columns % self.group:
                return Reject(f"groups of {self.group} do not divide its {columns} channels")
            return self._search(seen[name], weights)

        return (scaling_rule(wanted, choose),)

    def _search(self, seen: Seen, weights: Sequence[torch.Tensor]) -> torch.Tensor | Reject:
        """Return the scale of least loss; a reason when none beats leaving weights as they are."""
        mean = seen.magnitude / seen.count
        best, least = None, self._loss(torch.ones_like(mean), seen.gram, weights)
        for step in range(1, _GRID):
            scale = (mean ** (step / _GRID)).clamp(min=_SMALLEST)
            scale = scale / (scale.max() * scale.min()).sqrt()
            if (loss := self._loss(scale, seen.gram, weights)) < least:
                best, least = scale, loss
        return Reject("no scale loses less") if best is None else best

    def _loss(self, scale: torch.Tensor, gram: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
        """Return the squared error of the readers' outputs on the calibration data."""
        total = 0.0
        for weight in weights:
            scaled = (weight.double() * scale).to(weight.dtype)
            found = quantize_groups(scaled, bits=self.bits, group=self.group, symmetric=self.symmetric)
            error = dequantized(found).double() / scale - weight.double()
            total += float(((error @ gram) * error).sum())
        return total
