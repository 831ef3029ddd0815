"""What the units of a group are worth: one number each, larger is more important.

    magnitude    the sum of the squares of all weights that go with the unit (after Li et al., arXiv 1608.08710)
    wanda        |W_ij| * ||X_j|| summed over what the unit's channels j feed (Sun et al., arXiv 2306.11695, by columns)
    taylor       the first-order change of the answer when the unit is masked, squared: with m = 1 a factor on the
                 unit's channels, the mean over samples of (dL/dm)^2 (Molchanov et al., arXiv 1611.06440; Kwon et al.,
                 arXiv 2204.09656).  There are no labels: L is the log-likelihood of an answer that the model draws
                 itself (``answers.py``), so that the mean is the leading term of the divergence of the masked model
                 from the whole one
    optin        the change of later layers, measured; see ``optin.py``

Activations are those where a linear layer reads the group, on calibration data without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from xformopt.analysis.coupling import Group
from xformopt.errors import DataError
from xformopt.match import operand
from xformopt.passes.answers import answer_of, valid_rows
from xformopt.program import Program, interpret
from xformopt.program.interpret import call

__all__ = [
    "Importance",
    "Scores",
    "activation_energy",
    "magnitude",
    "read_values",
    "require_batches",
    "taylor",
    "wanda",
]

Importance: TypeAlias = Literal["magnitude", "wanda", "taylor", "optin"]
# the importance of every unit, float64 [units]
Scores: TypeAlias = dict[Group, torch.Tensor]
_Batch: TypeAlias = Mapping[str, torch.Tensor]

# answers drawn for each batch
_DRAWS = 2


def magnitude(program: Program, groups: Sequence[Group]) -> Scores:
    """Return the sum of squares of the weights of every unit."""
    found: Scores = {}
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for (name, axis), units in group.parameters.items():
            squares = program.parameters[name].double().square().movedim(axis, 0)
            total.index_add_(0, units, squares.reshape(len(units), -1).sum(1))
        found[group] = total
    return found


def activation_energy(
    program: Program, batches: Sequence[_Batch], names: Sequence[str], progress: Callable[[str, int, int], None]
) -> dict[str, torch.Tensor]:
    """Return the sum of squares of every channel over all valid positions, float64 ``[C]``, by value name.

    Raises:
        DataError: there are no batches.

    """
    require_batches(batches)
    found: dict[str, torch.Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in wanted:
            rows = valid_rows(program, node.meta["val"], value, batch).double()
            found[node.name] = found.get(node.name, 0) + rows.square().sum(0)

    wanted = set(names)
    for index, batch in enumerate(batches):
        progress("looking at activations", index, len(batches))
        interpret(program, batch, observe=observe)
    return found


def require_batches(batches: Sequence[_Batch]) -> None:
    """Raise DataError where there is nothing to look at."""
    if not batches:
        raise DataError(
            "What a unit is worth is measured on calibration data, and there is none. Give some with --calibration (or "
            "calibration=... in Python), or choose importance=magnitude, which needs none."
        )


def read_values(program: Program, group: Group) -> list[tuple[fx.Node, fx.Node, torch.Tensor]]:
    """Return the linear layers that read a group, what they read, and the unit of each of its channels."""
    named = {node.name: node for node in program.graph.nodes}
    found = []
    for name in group.consumers:
        source = operand(named[name])
        found.append((named[name], source, group.values[source.name, source.meta["val"].dim() - 1]))
    return found


def wanda(program: Program, groups: Sequence[Group], energy: Mapping[str, torch.Tensor]) -> Scores:
    """Return the sum of ``|W_ij| * ||X_j||`` over the weights that every unit feeds."""
    found: Scores = {}
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for linear, source, units in read_values(program, group):
            weight = program.parameters[str(operand(linear, 1).target)].double()
            total.index_add_(0, units, weight.abs().sum(0) * energy[source.name].sqrt())
        found[group] = total
    return found


@dataclass
class _Masked:
    """Runs a program for gradients, with a factor of one on every unit of every sample."""

    program: Program
    groups: Sequence[Group]
    masks: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reading: dict[str, list[tuple[int, str, torch.Tensor]]] = {}
        for index, group in enumerate(self.groups):
            for linear, source, units in read_values(self.program, group):
                self.reading.setdefault(linear.name, []).append((index, source.name, units))

    def run(self, batch: _Batch) -> dict[str, torch.Tensor]:
        """Return the outputs, differentiable by the masks that this makes, each ``[B, units]``."""
        self.masks = {}
        values: dict[fx.Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                values[node] = batch[str(node.target)]
            elif node.op == "get_attr":
                values[node] = self.program.parameters[str(node.target)]
            else:
                args = list(fx.map_arg(node.args, values.__getitem__))
                for index, _, units in self.reading.get(node.name, ()):
                    args[0] = args[0] * self._mask(node.name, index, args[0], units)
                values[node] = call(node.target, args, fx.map_arg(node.kwargs, values.__getitem__))
        return dict(zip(self.program.output_names, (values[node] for node in self.program.results), strict=True))

    def _mask(self, name: str, index: int, value: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(len(value), self.groups[index].units, requires_grad=True)
        self.masks[name, index] = mask
        return mask[:, units].reshape(len(value), *[1] * (value.dim() - 2), -1)

    def gradients(self) -> dict[int, torch.Tensor]:
        """Return what every unit's mask got, by group; a group that several layers read adds up."""
        found: dict[int, torch.Tensor] = {}
        for (_, index), mask in self.masks.items():
            assert mask.grad is not None
            # windows of one image are rows of their own: what counts is the sum of squares, whatever a row is
            found[index] = found[index] + mask.grad if index in found else mask.grad.clone()
            mask.grad = None
        return found


def taylor(
    program: Program,
    groups: Sequence[Group],
    batches: Sequence[_Batch],
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Scores:
    """Return the mean of ``(dL/dm)^2`` over samples, L the log-likelihood of answers that the model draws itself."""
    require_batches(batches)
    found = {group: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    generator = torch.Generator().manual_seed(seed)
    masked = _Masked(program, groups)
    for number, batch in enumerate(batches):
        progress("differentiating", number, len(batches))
        with torch.enable_grad():
            answer = answer_of(program, masked.run(batch), batch)
            for draw in range(_DRAWS):
                likelihood = answer.log_likelihood_of_draws(generator)
                likelihood.backward(retain_graph=draw + 1 < _DRAWS)
                for index, gradient in masked.gradients().items():
                    found[groups[index]] += gradient.double().square().sum(0)
    return found
