"""Which linear layers can be factorized, what they read on calibration data, and how much their errors matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.analysis.cost import operator_name
from xformopt.errors import DataError, PassError
from xformopt.match import arguments, is_call, operand, readers, xf
from xformopt.passes.answers import Answer, answer_of
from xformopt.passes.gram_matrices import gram_matrices
from xformopt.passes.replay import Replay
from xformopt.passes.weights import check_weights, is_skipped, linear_layers
from xformopt.pipeline import Context
from xformopt.program import Program, path_of
from xformopt.program.interpret import call
from xformopt.rewrite import Rejected

__all__ = ["Candidates", "Shared", "find_candidates", "measured_loss", "seen_inputs"]

# batches on which the sensitivity of layers is measured
_MEASURED = 2


@dataclass(frozen=True)
class Shared:
    """Linear layers that share one weight ``[O, I]``, and so its factors."""

    weight_name: str
    nodes: tuple[fx.Node, ...]
    weight: torch.Tensor

    @property
    def path(self) -> str:
        """Where the first of the layers comes from."""
        return path_of(self.nodes[0]) or self.nodes[0].name


@dataclass
class Candidates:
    """What may be factorized, by weight, and why other layers may not."""

    rule: str
    layers: dict[str, Shared]
    rejected: list[Rejected]

    def refuse(self, weight_name: str, reason: str) -> None:
        """Take layers out."""
        shared = self.layers.pop(weight_name)
        self.rejected += [Rejected(self.rule, path_of(node), node.name, reason) for node in shared.nodes]


def find_candidates(program: Program, rule: str, skip: Sequence[str]) -> Candidates:
    """Return the linear layers whose weight is theirs alone.

    Raises:
        PassError: the program has no linear layers with a parameter for a weight; the message says what it has.

    """
    every = linear_layers(program)
    if not every:
        operators = sorted({operator_name(node.target) for node in program.nodes()})
        raise PassError(
            f"The program {program.name!r} has nothing that {rule} could factorize. Looked for: linear layers whose "
            f"weight is a parameter. Found: {', '.join(operators) or 'no operators'}."
        )
    check_weights(program, [node for node in every if not is_skipped(node, skip)])
    by_weight: dict[str, list[fx.Node]] = {}
    for node in every:
        by_weight.setdefault(str(operand(node, 1).target), []).append(node)
    layers = {name: Shared(name, tuple(nodes), program.parameters[name]) for name, nodes in by_weight.items()}
    found = Candidates(rule, layers, [])
    for name, nodes in by_weight.items():
        if (reason := _refusal(nodes, skip)) is not None:
            found.refuse(name, reason)
    return found


def _refusal(nodes: Sequence[fx.Node], skip: Sequence[str]) -> str | None:
    if any(is_skipped(node, skip) for node in nodes):
        return "it is named in skip"
    if any(user not in nodes for user in operand(nodes[0], 1).users):
        return "something else reads its weight, which would have to stay"
    if any(_is_factor(node) for node in nodes):
        return "it is one of two linear layers in a row: a product of factors already"
    return None


def _is_factor(node: fx.Node) -> bool:
    return _is_down(node) or _is_down(operand(node))


def _is_down(node: fx.Node) -> bool:
    """Whether ``node`` is a linear layer of no bias that one other linear layer reads, and nothing else."""
    if not is_call(node, xf.linear) or arguments(node)["bias"] is not None or len(node.users) != 1:
        return False
    (reader,) = readers(node) or (None,)
    return is_call(reader, xf.linear, xf.linear_activation) and operand(reader) is node


def seen_inputs(
    program: Program,
    found: Candidates,
    context: Context,
    use: Callable[[Shared, torch.Tensor, int], None],
    *,
    otherwise: str,
) -> None:
    """Call ``use`` with every layer, ``X^T X`` of what it reads on calibration data, and the number of positions.

    Layers with a channel that the data never excites are refused: how much it counts is not known.

    Raises:
        DataError: there is no calibration data; ``otherwise`` says what needs none.

    """
    if not context.calibration:
        raise DataError(
            f"The error of a factorized layer is weighed by what it reads on calibration data, and there is none. Give "
            f"some with --calibration (or calibration=... in Python), or set {otherwise}, which needs none."
        )
    sources = {node.name: operand(node).name for shared in found.layers.values() for node in shared.nodes}
    grams: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    waiting = {name: {sources[node.name] for node in shared.nodes} for name, shared in found.layers.items()}
    for part in gram_matrices(program, context.calibration, list(dict.fromkeys(sources.values())), context.progress):
        grams |= {name: seen.gram for name, seen in part.items()}
        counts |= {name: seen.count for name, seen in part.items()}
        for name in [name for name, read in waiting.items() if read <= grams.keys()]:
            shared, read = found.layers[name], sorted(waiting.pop(name))
            gram = torch.stack([grams[source] for source in read]).sum(0)
            silent = int((gram.diagonal() == 0).sum())
            if silent:
                found.refuse(
                    name,
                    f"the calibration data never excites {silent} of its {len(gram)} input channels, so that what they "
                    f"count is not known: give more varied data, or set {otherwise}",
                )
                continue
            use(shared, gram, sum(counts[source] for source in read))
        needed = set().union(*waiting.values()) if waiting else set()
        grams = {name: gram for name, gram in grams.items() if name in needed}


def measured_loss(
    program: Program, context: Context, probes: Sequence[tuple[Shared, torch.Tensor]]
) -> dict[str, float]:
    """Return how far the program's answers diverge when one weight alone is replaced by its probe, by weight.

    Kullback-Leibler divergence where the program returns logits, half the squared distance otherwise; the mean over
    positions of two calibration batches, or of the example inputs.

    Raises:
        DataError: there are neither.

    """
    batches: list[Mapping[str, torch.Tensor]] = list(context.calibration[:_MEASURED])
    if not batches and program.example_inputs:
        batches = [program.example_inputs]
    if not batches:
        raise DataError(
            "The sensitivity of layers is measured on calibration data, and there is none, nor has the program example "
            "inputs. Give some with --calibration (or calibration=... in Python), or give all layers one rank."
        )
    found = {shared.weight_name: 0.0 for shared, _ in probes}
    for place, batch in enumerate(batches):
        replay = Replay(program, batch)
        wanted = answer_of(program, replay.outputs, batch)
        for index, (shared, probe) in enumerate(probes):
            context.progress("measuring sensitivity", place * len(probes) + index, len(batches) * len(probes))
            for node in shared.nodes:
                answer = _answer_with(replay, node, probe)
                divergence = float(wanted.divergence(answer).clamp(min=0))
                found[shared.weight_name] += divergence / len(batches)
    return found


def _answer_with(replay: Replay, node: fx.Node, weight: torch.Tensor) -> Answer:
    """Return the program's answer where one layer has another weight."""
    program, held = replay.program, operand(node, 1)

    def read(argument: fx.Node) -> Any:
        return weight if argument is held else replay.values[argument]

    with torch.no_grad():
        value = call(node.target, fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read))
    values = replay.run(node, value, 1, program.results)
    outputs = {spec.name: values[result] for spec, result in zip(program.outputs, program.results, strict=True)}
    return answer_of(program, outputs, replay.batch)
