"""Write the weights of linear layers as products of two smaller ones, until a budget is met.

    y = W x + b    ->    y = U (V x) + b,    U [O, r], V [r, I],    which is smaller where r < O I / (O + I)

U V is the matrix of rank r whose output on calibration data is nearest to that of W (``whiten``), or the one nearest to
W itself.  What an error costs is measured: each layer alone is replaced by a probe at half of the rank at which it
would break even, and the divergence of the program's answers, over the squared error of the layer's own output, is the
layer's sensitivity.  Ranks then share the budget so that the sum of sensitivity times squared error is least, a
multiple-choice knapsack problem.

**Approximate**; needs calibration data, or example inputs and ``whiten=false``.  Run it before the passes that merge or
quantize linear layers; what it leaves are ordinary linear layers, which can be quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xformopt.analysis import cost
from xformopt.errors import PassError
from xformopt.match import arguments, call_with, operand, xf
from xformopt.passes.budgets import Budget, meet_latency, used
from xformopt.passes.factorize.support.layers import Candidates, Shared, find_candidates, measured_loss, seen_inputs
from xformopt.passes.factorize.support.low_rank import LowRank, break_even, decompose, whitening
from xformopt.passes.knapsack import Selection, undominated
from xformopt.pipeline import Context, Effect, Pass, PassResult
from xformopt.program import Program, path_of
from xformopt.rewrite import Editor, Fired, rewrite

__all__ = ["FactorizeWeights"]

# ranks of one layer that are weighed against those of others, at most
_RANKS = 32
_ADVICE = "Ask for less, or prune heads, units or width as well."


@dataclass(frozen=True)
class _Option:
    """A rank of one layer (None: as it is), what it costs of the budget, and how far it is foreseen to diverge."""

    rank: int | None
    cost: float
    loss: float


@dataclass(frozen=True)
class FactorizeWeights(Pass):
    """Replace linear layers by two smaller ones each, until a budget is met.

    Attributes:
        remove: The share of the budgeted quantity to remove, between 0 and 1.
        budget: What is budgeted: flops, at the example shape; parameters; latency, measured on the target.
        rank: One rank for every layer in place of a budget.  None: ranks follow from the budget.
        whiten: Weigh errors by what each layer reads on calibration data, instead of by the weight alone.
        multiple: Of every rank: 1, 8, 16 or 32.
        even_if_larger: With rank, factorize also where two layers are no smaller than the one.
        skip: Shell patterns of module paths or weight names that stay whole.

    """

    remove: float = 0.4
    budget: Budget = "flops"
    rank: int | None = None
    whiten: bool = True
    multiple: int = 8
    even_if_larger: bool = False
    skip: tuple[str, ...] = ()

    effect: ClassVar[Effect] = "approximate"
    before_fusion: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Wang et al., SVD-LLM, arXiv 2403.07378, section 3.1 (whitening by the Cholesky factor)",
        "Yuan et al., ASVD, arXiv 2312.05821 (activation-aware SVD, sensitivity of layers)",
        "Cahyawijaya, Greenformers, arXiv 2108.10808 (when low rank pays)",
    )

    def __post_init__(self) -> None:
        if not 0 < self.remove < 1:
            raise ValueError(f"remove must lie between 0 and 1, but is {self.remove}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, but is {self.rank}: a layer of rank 0 answers its bias alone")
        if self.multiple not in (1, 8, 16, 32):
            raise ValueError(f"multiple must be 1, 8, 16 or 32, but is {self.multiple}")
        if self.even_if_larger and self.rank is None:
            raise ValueError("even_if_larger goes with rank: a budget is met by what gets smaller")

    def run(self, program: Program, context: Context) -> PassResult:
        """Decompose every layer, choose ranks, and replace the layers."""
        found = find_candidates(program, self.name, self.skip)
        for name, shared in list(found.layers.items()):
            if (reason := self._refusal(shared)) is not None:
                found.refuse(name, reason)
        spectra = self._decompositions(program, found, context)
        if self.rank is not None:
            ranks = {name: min(self.rank, spectrum.full) for name, spectrum in spectra.items()}
            foreseen = "one rank for all"
        else:
            ranks, foreseen = self._within_budget(program, context, found, spectra)
        result, fired = _replaced(program, found.layers, spectra, ranks)
        for name in [name for name in found.layers if name not in ranks]:
            found.refuse(name, "the budget is better spent elsewhere")
        if not fired:
            return PassResult(program, False, (), tuple(found.rejected))
        return PassResult(result, True, fired, tuple(found.rejected), self._notes(program, result, ranks, foreseen))

    def _refusal(self, shared: Shared) -> str | None:
        outputs, inputs = shared.weight.shape
        limit = break_even(outputs, inputs)
        if self.rank is None:
            if self.multiple < limit:
                return None
            return f"no rank that is a multiple of {self.multiple} is below {limit:.1f}, where it would pay"
        if self.even_if_larger or self.rank < limit:
            return None
        return f"rank {self.rank} does not pay: two layers are smaller than the one below rank {limit:.1f}"

    def _decompositions(self, program: Program, found: Candidates, context: Context) -> dict[str, LowRank]:
        spectra: dict[str, LowRank] = {}
        if not found.layers:
            return spectra

        def decompose_seen(shared: Shared, gram: torch.Tensor, count: int) -> None:
            context.progress("decomposing weights", len(spectra), len(found.layers))
            spectra[shared.weight_name] = decompose(shared.weight, whitening(gram, count))

        if self.whiten:
            seen_inputs(program, found, context, decompose_seen, otherwise="whiten=false")
        else:
            spectra = {name: decompose(shared.weight, None) for name, shared in found.layers.items()}
        return spectra

    def _within_budget(
        self, program: Program, context: Context, found: Candidates, spectra: Mapping[str, LowRank]
    ) -> tuple[dict[str, int], str]:
        """Return the ranks of the layers that are factorized, and a sentence on how far that is foreseen to go."""
        names = list(spectra)
        costs = self._costs(program, found.layers)
        options = self._options(program, context, [found.layers[name] for name in names], spectra, costs)
        selections = undominated([[(option.cost, option.loss) for option in each] for each in options])
        whole, most = (sum(each[0].cost for each in options), sum(min(o.cost for o in each) for each in options))

        def ranks_of(selection: Selection) -> dict[str, int]:
            picked = [each[index].rank for each, index in zip(options, selection.options, strict=True)]
            return {name: rank for name, rank in zip(names, picked, strict=True) if rank is not None}

        def choose(part: float) -> Selection:
            limit = whole - part * (whole - most)
            return [selection for selection in selections if selection.cost <= limit + 1e-6 * whole][-1]

        if self.budget == "latency":
            chosen = meet_latency(
                program,
                self.remove,
                context,
                choose,
                lambda selection: _replaced(program, found.layers, spectra, ranks_of(selection))[0],
                "every layer at its smallest rank",
                _ADVICE,
            )
        else:
            total = used(program, self.budget)
            if whole - most < self.remove * total:
                raise PassError(
                    f"The budget cannot be met: {self.remove:.0%} of the {self.budget} are to go, and with every layer "
                    f"at its smallest rank ({self.multiple}) {(whole - most) / total:.1%} can. {_ADVICE}"
                    f"{_refusals(found)}"
                )
            chosen = choose(self.remove * total / (whole - most))
        return ranks_of(chosen), f"foreseen divergence {chosen.loss:.1e}"

    def _costs(self, program: Program, layers: Mapping[str, Shared]) -> dict[str, float]:
        """Return what each weight costs of the budget as it is; time, while it is shared out, counts as FLOPs."""
        if self.budget == "parameters":
            return {name: shared.weight.numel() for name, shared in layers.items()}
        # an activation behind it stays as it is, so that products alone count
        by_node = {node.name: node.flops for node in cost(program).by_node}
        products = {
            node.name: by_node[node.name] * _share_of_product(node) for each in layers.values() for node in each.nodes
        }
        return {name: sum(products[node.name] for node in shared.nodes) for name, shared in layers.items()}

    def _options(
        self,
        program: Program,
        context: Context,
        layers: Sequence[Shared],
        spectra: Mapping[str, LowRank],
        costs: Mapping[str, float],
    ) -> list[list[_Option]]:
        probes = []
        for shared in layers:
            spectrum = spectra[shared.weight_name]
            down, up = spectrum.factors(self._probe(shared))
            probes.append((shared, (up @ down).to(shared.weight.dtype)))
        diverged = measured_loss(program, context, probes)
        found = []
        for shared in layers:
            name, spectrum = shared.weight_name, spectra[shared.weight_name]
            error = spectrum.lost(self._probe(shared))
            sensitivity = diverged[name] / error if error > 0 else 0.0
            limit = break_even(*shared.weight.shape)
            options = [_Option(None, costs[name], 0.0)]
            for rank in self._ranks(limit):
                options.append(_Option(rank, costs[name] * rank / limit, sensitivity * spectrum.lost(rank)))
            found.append(options)
        return found

    def _probe(self, shared: Shared) -> int:
        return max(1, round(break_even(*shared.weight.shape) / 2))

    def _ranks(self, limit: float) -> list[int]:
        every = [rank for rank in range(self.multiple, int(limit) + 1, self.multiple) if rank < limit]
        places = torch.linspace(0, len(every) - 1, min(_RANKS, len(every))).round().long().tolist()
        return [every[place] for place in places]

    def _notes(self, before: Program, after: Program, ranks: Mapping[str, int], foreseen: str) -> tuple[str, ...]:
        spread = sorted(ranks.values())
        removed = (
            f"{budget}: {1 - used(after, budget) / used(before, budget):.1%} removed"
            for budget in ("flops", "parameters")
        )
        return (f"{len(ranks)} weights factorized, ranks {spread[0]} to {spread[-1]}; {foreseen}", *removed)


def _refusals(found: Candidates) -> str:
    reasons = sorted({refusal.reason for refusal in found.rejected})
    return f" Layers that stay whole: {'; '.join(reasons)}." if reasons else ""


def _share_of_product(node: fx.Node) -> float:
    """Return the part of a layer's FLOPs that its product takes."""
    if node.target is xf.linear:
        return 1.0
    product = 2 * int(operand(node, 1).meta["val"].shape[1])
    return product / (product + (1 if arguments(node)["function"] == "relu" else 8))


def _replaced(
    program: Program, layers: Mapping[str, Shared], spectra: Mapping[str, LowRank], ranks: Mapping[str, int]
) -> tuple[Program, tuple[Fired, ...]]:
    chosen = {node.name: name for name in ranks for node in layers[name].nodes}
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def factorize_linear(editor: Editor, node: fx.Node) -> fx.Node | None:
        if (name := chosen.get(node.name)) is None:
            return None
        if name not in made:
            down, up = (part.to(layers[name].weight.dtype).contiguous() for part in spectra[name].factors(ranks[name]))
            made[name] = down, up
        stem = name.removesuffix("weight").rstrip("._") or name
        narrow = editor.call(xf.linear, operand(node), editor.parameter(f"{stem}.down.weight", made[name][0]))
        wide = call_with(editor, node, x=narrow, weight=editor.parameter(f"{stem}.up.weight", made[name][1]))
        narrow.meta["path"] = wide.meta["path"] = path_of(node)
        return wide

    done = rewrite(program, {"factorize-linear": factorize_linear}, sweeps=1)
    return done.program, done.fired
