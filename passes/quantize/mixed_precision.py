"""Choose for each linear layer how many bits it gets, within a budget of size, time or drift.

Of layer l and each candidate b, three things are measured: the drift d(l, b) of the program's outputs (relative L2)
when this layer alone is quantized so, the bytes that it saves, and, where time counts, what the layer takes alone on
the target.  Errors of layers are taken to be independent, so that their squares add up:

    budget of size or time:    minimize   sum_l d(l, b_l)^2    such that    sum_l cost(l, b_l) <= limit
    budget of drift:           minimize   sum_l cost(l, b_l)   such that    the drift of all together <= limit

Either is a multiple-choice knapsack problem, solved by dynamic programming over undominated (cost, loss) pairs.  Under
a budget of drift, the cheapest of them that keeps the limit is found by bisection, its drift measured each time.

**Approximate**; needs calibration data or example inputs.  Run it after the passes that look for linear layers.  What
is chosen as ``int8`` executes in integers; ``int4-weights`` and its like are stored in few bits and computed in float.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from xformopt.passes.knapsack import Selection, undominated
from xformopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from xformopt.passes.quantize.quantize_weights import QuantizeWeights
from xformopt.passes.quantize.support.layer_study import LayerStudy, Option, Unit
from xformopt.passes.quantize.support.quantized_layers import QuantizeLinears, quantize_layers, refuse_repetition
from xformopt.passes.weights import check_weights, is_skipped, linear_layers
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Level, Program
from xformopt.rewrite import Reject

__all__ = ["MixedPrecision"]

_STORED = re.compile(r"int(?P<bits>\d+)-weights")


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Choose the bits of each linear layer by what is measured, within a budget.

    Attributes:
        budget: What is limited: the bytes of all parameters, the time of the linear layers, or the drift of outputs.
        limit: Of size and time the share of what the given program takes; of drift the relative L2 of the outputs.
        minimize: What a budget of drift saves: size or time.
        candidates: What a layer may become besides staying in float: int8 executes in integers, int4-weights and
            int8-weights are stored in so many bits.
        group: Neighbouring input channels of stored weights that share a scale: 16, 32, 64, 128 or 256.
        method: How stored weights are rounded: nearest, or gptq by what layers see on calibration data.
        skip: Shell patterns of module paths or weight names that stay in floating point.

    """

    budget: Literal["size", "time", "drift"] = "drift"
    limit: float = 0.05
    minimize: Literal["size", "time"] = "size"
    candidates: tuple[str, ...] = ("int8", "int4-weights")
    group: int = 32
    method: Literal["nearest", "gptq"] = "nearest"
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    leaves: ClassVar[Level] = Level.TARGET
    sources: ClassVar[tuple[str, ...]] = (
        "Dong et al., HAWQ-V2, arXiv 1911.03852, section 3.2 (undominated selections by sensitivity of layers)",
        "Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations Research 27(3), 1979",
    )

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ValueError(f"limit must be positive, but is {self.limit}")
        if not self.candidates:
            raise ValueError("candidates must name at least one precision, such as int8")
        self._quantizers()

    def _quantizers(self) -> dict[str, QuantizeLinears]:
        return {name: self._quantizer(name) for name in self.candidates}

    def _quantizer(self, name: str) -> QuantizeLinears:
        if name == "int8":
            return QuantizeDynamic()
        if (stored := _STORED.fullmatch(name)) is None:
            raise ValueError(f"a candidate is int8, int4-weights or int8-weights, not {name!r}")
        return QuantizeWeights(bits=int(stored["bits"]), group=self.group, method=self.method)

    @property
    def _cost(self) -> Literal["size", "time"]:
        return self.minimize if self.budget == "drift" else self.budget

    def run(self, program: Program, context: Context) -> PassResult:
        """Measure every layer with every candidate, choose, and quantize as chosen."""
        layers = [node for node in linear_layers(program) if not is_skipped(node, self.skip)]
        if not linear_layers(program):
            refuse_repetition(program, {"quantized_linear", "weight_only_linear"}, "linear layers")
        if not layers:
            return quantize_layers(program, lambda *_: Reject("there is nothing to choose"), self.skip, {})
        check_weights(program, layers)
        study = LayerStudy(program, context, layers, self._quantizers(), skip=self.skip, is_timed=self._cost == "time")
        selections = undominated([[self._priced(option) for option in unit.options] for unit in study.units])
        chosen, note = self._chosen(study, selections)
        result = _applied(study, chosen)
        return replace(result, notes=(note, _summary(study, chosen, result), *_choices(study.units, chosen)))

    def _priced(self, option: Option) -> tuple[float, float]:
        """Return what an option costs, over what staying in float does where that is size, and what it loses."""
        return (-option.saved_bytes if self._cost == "size" else option.milliseconds), option.drift**2

    def _chosen(self, study: LayerStudy, selections: Sequence[Selection]) -> tuple[Selection, str]:
        """Return the selection that the budget asks for, and a sentence on the budget."""
        if self.budget == "drift":
            return self._within_drift(study, selections)
        whole, given = (
            (study.program.parameter_bytes, study.program.parameter_bytes)
            if self.budget == "size"
            else (sum(unit.options[0].milliseconds for unit in study.units), 0.0)
        )
        within = [selection for selection in selections if selection.cost + given <= self.limit * whole]
        chosen = within[-1] if within else selections[0]
        share = (chosen.cost + given) / whole
        if not within:
            return chosen, (
                f"a {self.budget} of {self.limit:.1%} cannot be reached with these candidates: the best is {share:.1%}"
            )
        return chosen, f"of all selections within a {self.budget} of {self.limit:.1%} ({share:.1%}), it loses least"

    def _within_drift(self, study: LayerStudy, selections: Sequence[Selection]) -> tuple[Selection, str]:
        """Bisect for the cheapest selection that keeps the limit; the last one, of least loss, changes least."""
        broken, kept = -1, len(selections) - 1
        while kept - broken > 1:
            middle = (broken + kept) // 2
            result = _applied(study, selections[middle])
            if study.drift(result.program) <= self.limit:
                kept = middle
            else:
                broken = middle
        chosen = selections[kept]
        if not any(chosen.options) and len(selections) > 1:
            return chosen, f"no layer can be quantized with a drift of at most {self.limit:.2e}"
        return chosen, f"of the selections within a drift of {self.limit:.2e}, it takes the least {self._cost}"


def _applied(study: LayerStudy, selection: Selection) -> PassResult:
    chosen: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for unit, index in zip(study.units, selection.options, strict=True):
        for node in unit.layers:
            if index:
                chosen[node.name] = unit.options[index].name
            else:
                reasons[node.name] = f"the budget is better spent elsewhere: {unit.measured}"
    return study.quantize(chosen, reasons)


def _summary(study: LayerStudy, selection: Selection, result: PassResult) -> str:
    counts: Counter[str] = Counter()
    for unit, index in zip(study.units, selection.options, strict=True):
        counts[unit.options[index].name] += len(unit.layers)
    before, after = study.program.parameter_bytes, result.program.parameter_bytes
    return (
        f"{', '.join(f'{count} layers {name}' for name, count in counts.most_common())}: "
        f"{after / before:.1%} of the bytes, drift {study.drift(result.program):.2e} "
        f"({selection.loss**0.5:.2e} foreseen)"
    )


def _choices(units: Sequence[Unit], selection: Selection) -> list[str]:
    pairs = zip(units, selection.options, strict=True)
    return [f"{unit.path}: {unit.options[index].name} ({unit.measured})" for unit, index in pairs]
