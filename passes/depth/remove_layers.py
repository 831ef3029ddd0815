"""Remove whole layers, the one of least Macro Influence first.

    x_i+1 = x_i + f_i(x_i)    ->    x_i+1 = x_i

The Macro Influence of a layer is how far the last hidden state turns without it, ``1 - mean cos(h, h_i)``; it is
measured again after each removal (Pei et al., arXiv 2411.14507, who then fold the removed layer into its neighbours:
that is the pass ``fuse-layers``).  Of a model with norms behind the sums, the norm that goes is the one in front of the
layer.

**Approximate**, without training; needs calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xformopt.analysis import cost
from xformopt.errors import PassError
from xformopt.passes.depth.support.layers import Layer, find_layers, refuse_too_many, remove_layers
from xformopt.passes.depth.support.macro_influence import macro_influence, require_calibration
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program

__all__ = ["RemoveLayers"]


@dataclass(frozen=True)
class RemoveLayers(Pass):
    """Remove whole layers by their Macro Influence.

    Attributes:
        layers: How many to remove.
        most: The largest Macro Influence that a removed layer may have; 2 sets no limit.

    """

    layers: int = 1
    most: float = 2.0

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Pei et al., FuseGPT, arXiv 2411.14507 (Macro Influence)",)

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, but is {self.layers}")
        if not 0 < self.most <= 2:
            raise ValueError(f"most must lie in (0, 2], but is {self.most}")

    def run(self, program: Program, context: Context) -> PassResult:
        """Remove one layer after the other."""
        require_calibration(context.calibration)
        refuse_too_many(self.name, program, self.layers)
        result = program
        gone: list[tuple[Layer, float]] = []
        while len(gone) < self.layers:
            context.progress("removing layers", len(gone), self.layers)
            influence = macro_influence(result, find_layers(result), context.calibration)
            layer = min(influence, key=influence.__getitem__)
            if influence[layer] > self.most:
                raise PassError(
                    f"The budget cannot be met: {self.layers} layers are to go, each of a Macro Influence of at most "
                    f"{self.most:g}. {len(gone)} are gone, and the least of the rest, {layer.name}, has "
                    f"{influence[layer]:.3g}."
                )
            gone.append((layer, influence[layer]))
            result = remove_layers(result, [layer])
        before, after = cost(program), cost(result)
        notes = (
            "removed: " + ", ".join(f"{layer.name} (Macro Influence {value:.3g})" for layer, value in gone),
            f"flops: {1 - after.flops / before.flops:.1%} removed",
            f"parameters: {1 - after.parameters / before.parameters:.1%} removed",
        )
        return PassResult(result, True, (), (), notes)
