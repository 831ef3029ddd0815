"""Refitting linear layers after a removal, so that they answer as before from what is left of their input.

For a layer y = W x + b of the original program, and x^ what the same layer reads in the pruned one:

    W', b' = argmin  E ||W' x^ + b' - t||^2  +  r ||W' - W_kept||^2,    r = ridge * mean diagonal of Cov(x^)

Layers are refitted in execution order, each behind those before it, so that t can make up for what went wrong earlier:
where the layer writes into a residual stream s = x + y, t is the original stream less what arrives at the pruned one;
elsewhere t is the original y.

Least-squares reconstruction after structured removal: He et al., arXiv 1707.06168; Kwon et al., arXiv 2204.09656.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.match import arguments, is_call, operand
from xformopt.passes.answers import valid_rows
from xformopt.program import Program, interpret, path_of

__all__ = ["refit"]

_Batch = Mapping[str, torch.Tensor]


class _ReachedError(Exception):
    """Stops a run once the last value that is asked for is there."""


def refit(
    original: Program,
    pruned: Program,
    layers: Sequence[str],
    batches: Sequence[_Batch],
    progress: Callable[[str, int, int], None],
    *,
    ridge: float = 1e-2,
) -> Program:
    """Return ``pruned`` with the named linear layers refitted; layers that share a parameter stay.

    Args:
        original: The program before the removal.
        pruned: After it; its values have the names of those that they came from.
        layers: Names of linear layers, in execution order.
        batches: Calibration data.
        progress: Called with (what, done, total).
        ridge: How much the pruned weights are held on to.

    Raises:
        DataError: there are no batches.

    """
    if not batches:
        raise DataError(
            "Reconstruction fits weights on calibration data, and there is none. Give some with --calibration (or "
            "calibration=... in Python), or set reconstruct=false."
        )
    result = pruned.copy()
    for done, name in enumerate(layers):
        progress("refitting layers", done, len(layers))
        linear = next(node for node in result.graph.nodes if node.name == name)
        if all(value.op == "get_attr" and len(value.users) == 1 for value in linear.all_input_nodes[1:]):
            moments = _collect(original, result, linear, batches)
            _replace(result, linear, moments, ridge)
    return result


@dataclass
class _Moments:
    """Sums over positions: of x^, t, and their products, float64."""

    x: torch.Tensor
    t: torch.Tensor
    xx: torch.Tensor
    tx: torch.Tensor
    count: int = 0

    @staticmethod
    def empty(inputs: int, outputs: int) -> _Moments:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return _Moments(zeros(inputs), zeros(outputs), zeros(inputs, inputs), zeros(outputs, inputs))

    def add(self, x: torch.Tensor, t: torch.Tensor) -> None:
        x, t = x.double(), t.double()
        self.x += x.sum(0)
        self.t += t.sum(0)
        self.xx += x.t() @ x
        self.tx += t.t() @ x
        self.count += len(x)


def _collect(original: Program, pruned: Program, linear: fx.Node, batches: Sequence[_Batch]) -> _Moments:
    source, (stream, arrives) = operand(linear), _stream(linear)
    outputs, inputs = (int(size) for size in operand(linear, 1).meta["val"].shape)
    moments = _Moments.empty(inputs, outputs)
    for batch in batches:
        known = _values(original, batch, {stream.name})
        found = _values(pruned, batch, {source.name} | ({arrives.name} if arrives is not None else set()))
        target = known[stream.name]
        if arrives is not None:
            target = target - found[arrives.name]
        rows = valid_rows(pruned, source.meta["val"], found[source.name], batch)
        moments.add(rows, valid_rows(pruned, linear.meta["val"], target, batch))
    return moments


def _stream(linear: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return the residual sum that a layer writes into and what else is added there, or the layer itself."""
    users = list(linear.users)
    if len(users) == 1 and is_call(users[0], torch.ops.aten.add.Tensor):
        terms = [term for term in users[0].args[:2] if isinstance(term, fx.Node)]
        others = [term for term in terms if term is not linear]
        if len(others) == 1 and arguments(users[0])["alpha"] == 1 and _shape(others[0]) == _shape(linear):
            return users[0], others[0]
    return linear, None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _values(program: Program, batch: _Batch, names: set[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in names:
            found[node.name] = value
        if len(found) == len(names):
            raise _ReachedError

    with contextlib.suppress(_ReachedError):
        interpret(program, batch, observe=observe)
    return found


def _replace(program: Program, linear: fx.Node, moments: _Moments, ridge: float) -> None:
    given = arguments(linear)
    name = str(given["weight"].target)
    weight = program.parameters[name]
    bias = program.parameters[str(given["bias"].target)] if given["bias"] is not None else None
    means = moments.x / moments.count, moments.t / moments.count
    if bias is None:
        # without a bias to refit, the means are part of what the weight answers
        means = torch.zeros_like(means[0]), torch.zeros_like(means[1])
    covariance = moments.xx / moments.count - torch.outer(means[0], means[0])
    cross = moments.tx / moments.count - torch.outer(means[1], means[0])
    old = weight.double()
    held = max(float(covariance.diagonal().mean()) * ridge, torch.finfo(torch.float64).tiny)
    damped = covariance + held * torch.eye(len(covariance), dtype=torch.float64)
    fitted = old + torch.linalg.solve(damped, (cross - old @ covariance).t()).t()
    if not bool(fitted.isfinite().all()):
        raise DataError(
            f"The calibration data does not determine the weight of {path_of(linear) or linear.name}: its inputs are "
            f"constant or not finite. Give more varied data, or set reconstruct=false."
        )
    program.parameters[name] = fitted.to(weight.dtype).contiguous()
    if bias is not None:
        program.parameters[str(given["bias"].target)] = (means[1] - fitted @ means[0]).to(bias.dtype)
