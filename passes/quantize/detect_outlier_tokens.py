"""Warn of tokens whose norm is out of all proportion, and say whether the weights account for them (SINDER).

At each sum of the residual stream: u, the leading left singular vector of the linearized layers up to there, and

    norm ratio = max_t |x_t| / median_t |x_t|,        alignment = mean over the longest tokens of |cos(x_t, u)|

Where both are large, a few tokens carry a direction that the weights amplify.  One range for a whole tensor then spends
its codes on them: keep such layers in float, or calibrate by a percentile.

**Exact**: it only reports, in its notes, and changes nothing; needs calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xformopt.analysis.outlier_tokens import Defect, Opaque, outlier_tokens
from xformopt.pipeline import Context, Pass, PassResult
from xformopt.program import Program
from xformopt.rewrite import Rejected

__all__ = ["DetectOutlierTokens"]


@dataclass(frozen=True)
class DetectOutlierTokens(Pass):
    """Report tokens of outlying norm, and whether the spectra of the weights foretell their direction.

    Attributes:
        ratio: Norm of the longest token, over the median, from which it is reported.
        alignment: Mean cosine of the longest tokens with the direction of the weights from which it explains them.

    """

    ratio: float = 4.0
    alignment: float = 0.5

    sources: ClassVar[tuple[str, ...]] = ("Wang et al., SINDER, arXiv 2407.16826, section 3",)

    def __post_init__(self) -> None:
        if self.ratio <= 1:
            raise ValueError(f"ratio must be larger than 1, but is {self.ratio}")
        if not 0 < self.alignment <= 1:
            raise ValueError(f"alignment must lie in (0, 1], but is {self.alignment}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Look at every sum; the program is returned as it is."""
        found = outlier_tokens(program, context.calibration, seed=context.seed)
        opaque = [place for place in found if isinstance(place, Opaque)]
        places = [place for place in found if isinstance(place, Defect)]
        notes = [self._warning(place) for place in places if place.norm_ratio >= self.ratio]
        if not places:
            notes = [f"nothing to look at: {len(opaque)} sums of two values [B, T, C], none of them with a linear map"]
        if not notes:
            largest = max((place.norm_ratio for place in places), default=1.0)
            notes.append(
                f"no token of outlying norm at {len(places)} sums of the residual stream: at most {largest:.1f} times "
                f"the median"
            )
        refused = tuple(Rejected("detect-outlier-tokens", place.path, place.value, place.reason) for place in opaque)
        return PassResult(program, False, (), refused, tuple(notes))

    def _warning(self, place: Defect) -> str:
        size = f"warning: at {place.path}, the longest token has {place.norm_ratio:.1f} times the median norm"
        if place.alignment < self.alignment:
            return f"{size}; the weights do not foretell its direction (|cos| {place.alignment:.2f})"
        return (
            f"{size}, along a direction that the weights amplify (|cos| {place.alignment:.2f}, {place.dominance:.1f} "
            f"times the next one)"
        )
