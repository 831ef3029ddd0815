"""Choose between low-rank weights and projected keys by the length of the input (Greenformers).

    up to ``long`` positions, or where size is what counts    low-rank weights (``factorize-weights``)
    beyond                                                    Linformer (``project-keys``)

Linear layers take most of the time of short inputs, attention that of long ones.  Where Linformer is refused, since
attention is causal or the length varies, weights are factorized.

**Tuned** where keys are projected; needs calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from xformopt.errors import PassError
from xformopt.match import arguments, is_call, xf
from xformopt.passes.budgets import Budget
from xformopt.passes.factorize.factorize_weights import FactorizeWeights
from xformopt.passes.factorize.project_keys import ProjectKeys
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, example_sizes, value_of

__all__ = ["ApplyGreenformers"]


@dataclass(frozen=True)
class ApplyGreenformers(Pass):
    """Factorize weights where inputs are short, project keys where they are long.

    Attributes:
        long: The number of keys beyond which attention is what is to be saved.
        remove: With low-rank weights, the share of the budgeted quantity to remove.
        budget: What is budgeted: flops, at the example shape; parameters, which low-rank weights alone save; latency.
        keys: With projected keys, how many there are.
        iterations: With projected keys, training steps of each block, at most.

    """

    long: int = 512
    remove: float = 0.4
    budget: Budget = "flops"
    keys: int = 128
    iterations: int = 400

    effect: ClassVar[Effect] = "tuned"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Cahyawijaya, Greenformers, arXiv 2108.10808",)

    def __post_init__(self) -> None:
        if self.long < 1:
            raise ValueError(f"long must be at least 1, but is {self.long}")
        self._low_rank()
        self._projection()

    def _low_rank(self) -> FactorizeWeights:
        return FactorizeWeights(remove=self.remove, budget=self.budget)

    def _projection(self) -> ProjectKeys:
        return ProjectKeys(keys=self.keys, iterations=self.iterations)

    def run(self, program: Program, context: Context) -> PassResult:
        """Look at the length of attention, and run the pass that suits it."""
        length = self._length(program)
        if self.budget == "parameters":
            return _noted(self._low_rank().run(program, context), "low-rank weights: parameters are what is to go")
        if length <= self.long:
            return _noted(self._low_rank().run(program, context), f"low-rank weights: {length} keys are few")
        projected = self._projection().run(program, context)
        if projected.changed:
            return _noted(projected, f"projected keys: {length} keys are many")
        reasons = "; ".join(sorted({refusal.reason for refusal in projected.rejected}))
        result = self._low_rank().run(program, context)
        result = replace(result, rejected=(*projected.rejected, *result.rejected))
        return _noted(result, f"low-rank weights, though {length} keys are many: {reasons}")

    def _length(self, program: Program) -> int:
        """Return the largest number of keys of any attention, at the example shape."""
        sizes = example_sizes(program)
        keys = [arguments(node)["k"] for node in program.nodes() if is_call(node, xf.attention)]
        if not keys:
            raise PassError(
                f"The program {program.name!r} has no attention, by whose length {self.name} chooses. Looked for: "
                f"xf.attention. Use factorize-weights, which does not ask for it."
            )
        return max(program.dims.evaluate(program.dims.shape(value_of(key))[1], sizes) for key in keys)


def _noted(result: PassResult, note: str) -> PassResult:
    return replace(result, notes=(note, *result.notes))
