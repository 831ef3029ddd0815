"""What masking a unit does to the rest of the network, measured (OPTIN).

    score(m) = sum over later layers j of ||G(F_j) - G(F_j^-m)||^2  +  lambda T^2 KL(p || p^-m)

F_j are the tokens of the residual stream behind a later sublayer, of which a random sample is taken; G(F) = F~ F~^T
with the tokens at length one; p the answer (``answers.py``), a softmax at temperature T = 4.  lambda makes the first
term ten times the second in the mean.  No gradients: one forward pass for each unit, from the unit's layer on, several
units at a time.  Where several layers read a unit, it is masked in one after the other, and the scores add up.

Khaki and Plataniotis, ICLR 2024, arXiv 2403.17921.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional

from xformopt.analysis.coupling import Group, find_groups
from xformopt.match import arguments
from xformopt.passes.answers import Answer, answer_of, valid_rows
from xformopt.passes.prune.support.importance import Scores, read_values, require_batches
from xformopt.passes.replay import Replay
from xformopt.program import Program

__all__ = ["optin", "residual_sums"]

_TEMPERATURE = 4.0
_DOMINANCE = 10.0
_TOKENS = 192
# elements of the masked value that one run may hold
_ELEMENTS = 1 << 22


def optin(
    program: Program,
    groups: Sequence[Group],
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    together: int,
    order: Scores,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Scores:
    """Return the scores of all units on the first batch.

    Args:
        program: What is pruned.
        groups: Whose units.
        batches: Calibration data.
        together: How many units of an FFN are masked by one forward pass, which then share its score; heads are masked
            one by one.
        order: Importances by which the units that share a pass are neighbours.
        seed: Of the tokens drawn.
        progress: Called with (what, done, total).

    """
    require_batches(batches)
    trial = _Trial(program, Replay(program, batches[0]), residual_sums(program), seed)
    measured: dict[Group, tuple[torch.Tensor, torch.Tensor]] = {}
    for done, group in enumerate(groups):
        progress("masking units", done, len(groups))
        sets = order[group].argsort().split(1 if group.kind == "heads" else together)
        measured[group] = trial.measure(group, sets)
    moved = torch.cat([manifold for manifold, _ in measured.values()]).mean()
    diverged = torch.cat([divergence for _, divergence in measured.values()]).mean()
    weight = moved / (_DOMINANCE * diverged) if diverged > 0 else torch.tensor(0.0)
    return {group: manifold + weight * divergence for group, (manifold, divergence) in measured.items()}


def residual_sums(program: Program) -> list[fx.Node]:
    """Return the sums of the residual stream behind every sublayer, in execution order."""
    named = {name for group in find_groups(program, "width") for name, _ in group.values}
    adds = [node for node in program.nodes() if node.target is torch.ops.aten.add.Tensor and node.name in named]
    return [node for node in adds if all(isinstance(term, fx.Node) for term in node.args[:2])]


@dataclass
class _Trial:
    program: Program
    replay: Replay
    stream: list[fx.Node]
    seed: int

    def __post_init__(self) -> None:
        self.samples = {node: self._sample(node) for node in self.stream}
        self.reference = {node: self._gram(node, self.replay.values[node], 1) for node in self.stream}
        self.teacher = answer_of(self.program, self.replay.outputs, self.replay.batch)

    def measure(self, group: Group, sets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both terms for every unit of a group, float64 ``[units]``."""
        found = torch.zeros(2, group.units, dtype=torch.float64)
        readers = read_values(self.program, group)
        for linear, source, units in readers:
            value = self.replay.values[source]
            count = self.replay.most(max(1, min(len(sets), _ELEMENTS // value.numel())))
            for start in range(0, len(sets), count):
                masked = sets[start : start + count]
                terms = self._mask(linear, value, units, masked)
                for position, unit in enumerate(masked):
                    found[:, unit] += terms[:, position].unsqueeze(1) / len(unit)
        return found[0], found[1]

    def _mask(
        self, linear: fx.Node, value: torch.Tensor, units: torch.Tensor, masked: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return both terms for each set of units, ``[2, sets]``."""
        factors = torch.stack([(~torch.isin(units, unit)).to(value.dtype) for unit in masked])  # [M, C]
        inputs = (value.unsqueeze(0) * factors.reshape(len(masked), *[1] * (value.dim() - 1), -1)).flatten(0, 1)
        given = arguments(linear)
        bias = self.replay.values[given["bias"]] if given["bias"] is not None else None
        output = functional.linear(inputs, self.replay.values[given["weight"]], bias)
        own = next((node for node in self.stream if node > linear), None)
        later = [node for node in self.stream if own is not None and node > own]
        wanted = [*later, *self.program.results]
        found = self.replay.run(linear, output, len(masked), wanted)
        manifold = torch.zeros(len(masked), dtype=torch.float64)
        for node in later:
            gram = self._gram(node, found[node], len(masked))
            manifold += (gram - self.reference[node]).double().square().sum((1, 2))
        outputs = dict(zip(self.program.output_names, (found[node] for node in self.program.results), strict=True))
        divergence = self.teacher.divergence(self._answers(outputs, len(masked)), _TEMPERATURE)
        return torch.stack([manifold, divergence])

    def _sample(self, node: fx.Node) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        rows = valid_rows(self.program, node.meta["val"], self.replay.values[node], self.replay.batch)
        return torch.randperm(len(rows), generator=generator)[:_TOKENS]

    def _gram(self, node: fx.Node, value: torch.Tensor, count: int) -> torch.Tensor:
        """Return the products of the sampled tokens of each of ``count`` runs, ``[count, N, N]``."""
        parts = value.reshape(count, -1, *value.shape[1:])
        rows = torch.stack([valid_rows(self.program, node.meta["val"], part, self.replay.batch) for part in parts])
        tokens = functional.normalize(rows[:, self.samples[node]], dim=-1)
        return tokens @ tokens.transpose(1, 2)

    def _answers(self, outputs: Mapping[str, torch.Tensor], count: int) -> Answer:
        """Return the answers of each of ``count`` runs, ``[count, N, C]``."""
        runs = [
            {name: value.reshape(count, -1, *value.shape[1:])[run] for name, value in outputs.items()}
            for run in range(count)
        ]
        rows = torch.stack([answer_of(self.program, run, self.replay.batch).rows for run in runs])
        return Answer(rows, self.teacher.are_logits)
