"""Tokens of outlying norm, and whether the weights explain them: singular defects (Wang, Zhang and Salzmann, SINDER).

A deep network maps some tokens to vectors far longer than all others.  They share one direction, which the weights
alone give away: take each step of the residual stream for a linear map, multiply the maps up to a layer, and the
leading left singular vector of the product is the direction.  Here a step x_k = F(x_{k-1}) is everything between two
sums of the residual stream, with attention taken for ``W_o W_v`` (every token reads itself alone), and its map is the
least-squares fit to F on normally distributed tokens of the length that the data have at that place.

The maps of attention, norms and identity come out of the one fit; that the MLP is fitted and not differentiated
follows the paper (arXiv 2407.16826, section 3), while fitting whole steps and the scale of the samples are our reading.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.kernels.definition import xf
from xformopt.match import arguments, is_call
from xformopt.program import Program, interpret, path_of, valid_positions
from xformopt.program.interpret import call
from xformopt.program.text import target_name

__all__ = ["Defect", "Opaque", "outlier_tokens"]

aten = torch.ops.aten

# tokens that a direction is compared with at each place, the longest ones
_TOKENS = 16
# samples for each channel of a fit
_SAMPLES = 6
_TOKEN_WISE = ("linear", "linear_activation", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "activation")
_TOKEN_WISE_ATEN = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem)


@dataclass(frozen=True)
class Defect:
    """The residual stream at one of its sums.

    Attributes:
        value: Name of the sum.
        path: Where in the model it is.
        direction: Leading left singular vector of the maps up to here, float64 ``[C]``.
        dominance: The largest singular value over the second.
        norm_ratio: The norm of the longest token over the median norm.
        alignment: Mean ``|cos|`` between the longest tokens and the direction; chance gives about ``C^-1/2``.

    """

    value: str
    path: str
    direction: torch.Tensor
    dominance: float
    norm_ratio: float
    alignment: float


@dataclass(frozen=True)
class Opaque:
    """A sum that has no linear map, and why; maps start anew behind it."""

    value: str
    path: str
    reason: str


def outlier_tokens(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], *, seed: int = 0
) -> list[Defect | Opaque]:
    """Compare the longest tokens of the residual stream with the directions that the weights single out.

    Args:
        program: A lifted program; its residual stream is made of sums of two ``[B, T, C]`` values.
        batches: Named inputs, at least one batch.
        seed: Of the samples that steps are fitted on.

    Returns:
        What was found at each sum, in execution order.

    Raises:
        DataError: there are no batches.

    """
    if not batches:
        raise DataError(
            "Outlier tokens are looked for on calibration data, and there is none. Give some with --calibration (or "
            "calibration=... in Python)."
        )
    sums = [node for node in program.nodes() if _is_sum(node)]
    seen = {node.name: _Longest() for node in sums}
    for batch in batches:
        interpret(program, batch, observe=partial(_look, program, batch, seen))
    generator = torch.Generator().manual_seed(seed)
    maps: dict[fx.Node, torch.Tensor] = {}
    found: list[Defect | Opaque] = []
    for node in sums:
        outcome = _step(program, node, sums, seen, generator)
        if isinstance(outcome, str):
            found.append(Opaque(node.name, path_of(node), outcome))
            continue
        before, fitted = outcome
        maps[node] = fitted @ maps[before] if before in maps else fitted
        found.append(_compared(node, maps[node], seen[node.name]))
    return found


def _is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds two values ``[B, T, C]``, alone or as part of a fused norm that hands the sum on.

    A fused norm whose sum nobody else reads stands between the layers of a post-norm model: its result counts.
    """
    if is_call(node, xf.add_layer_norm, xf.add_rms_norm):
        return False
    if node.target is operator.getitem:
        norm = node.args[0]
        return is_call(norm, xf.add_layer_norm, xf.add_rms_norm) and int(str(node.args[1])) == _stream_of(norm)
    if not is_call(node, aten.add.Tensor):
        return False
    both = [argument for argument in node.args if isinstance(argument, fx.Node) and argument.op == "call_function"]
    return len(both) == 2 and all(_shape(value) == _shape(node) and len(_shape(node)) == 3 for value in both)


def _stream_of(norm: fx.Node) -> int:
    """Return which result of a fused norm goes on: the sum where it is read (1), else what is normalized (0)."""
    return max((int(str(user.args[1])) for user in norm.users if user.target is operator.getitem), default=0)


def _shape(node: fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()


@dataclass
class _Longest:
    """The longest tokens at one place, and the norms of all."""

    tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    norms: list[torch.Tensor] = field(default_factory=list)

    def take(self, rows: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(rows, dim=1)
        self.norms.append(norms)
        known = torch.cat([self.tokens, rows]) if self.tokens.numel() else rows
        longest = torch.linalg.vector_norm(known, dim=1).argsort(descending=True)[:_TOKENS]
        self.tokens = known[longest]

    @property
    def median(self) -> float:
        return float(torch.cat(self.norms).median())

    @property
    def outlying(self) -> torch.Tensor:
        """Return the longest tokens: those nearer to the longest of all than to the median, by their norms' logs."""
        norms = torch.linalg.vector_norm(self.tokens, dim=1)
        return self.tokens[norms >= (norms.max() * self.median).sqrt()]


def _look(
    program: Program, batch: Mapping[str, torch.Tensor], seen: Mapping[str, _Longest], node: fx.Node, value: Any
) -> None:
    if node.name not in seen:
        return
    valid = valid_positions(program, node.meta["val"], batch)
    rows = value.reshape(-1, value.shape[-1])
    if valid is not None:
        rows = rows[valid.expand(*value.shape[:-1], 1).reshape(-1)]
    seen[node.name].take(rows.double())


def _step(
    program: Program,
    node: fx.Node,
    sums: Sequence[fx.Node],
    seen: Mapping[str, _Longest],
    generator: torch.Generator,
) -> tuple[fx.Node, torch.Tensor] | str:
    """Return the sum before ``node`` and the map between the two, or why there is none."""
    walk = _Walk(program, frozenset(sums) - {node})
    reason = walk.visit(node)
    if reason is not None:
        return reason
    if len(walk.reached) != 1:
        return "no sum comes before it" if not walk.reached else "several sums flow into it"
    (before,) = walk.reached
    width = int(node.meta["val"].shape[-1])
    length = seen[before.name].median / width**0.5
    samples = torch.randn(1, _SAMPLES * width, width, generator=generator, dtype=torch.float64) * length
    result = walk.run(node, before, samples)[0]
    # what is constant (biases) is no part of the map
    centered = samples[0] - samples[0].mean(0)
    fitted = torch.linalg.lstsq(centered, result - result.mean(0)).solution
    return before, fitted.t()


@dataclass
class _Walk:
    """A step as a function of single tokens: the operators between two sums, attention left out."""

    program: Program
    stops: frozenset[fx.Node]
    reached: set[fx.Node] = field(default_factory=set)
    order: dict[fx.Node, None] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> str | None:
        """Follow ``node`` back to the sums it depends on; a reason where that leads elsewhere."""
        if node in self.order or node.op == "get_attr":
            return None
        if node in self.stops:
            self.reached.add(node)
            return None
        if node.op == "placeholder":
            return f"it reads the input {node.name}"
        if not _is_token_wise(node):
            return f"{target_name(node.target)} is no function of single tokens"
        for argument in self._read(node):
            if (reason := self.visit(argument)) is not None:
                return reason
        self.order[node] = None
        return None

    def _read(self, node: fx.Node) -> list[fx.Node]:
        if (total := self._sum_beside(node)) is not None:
            return [total]
        return [arguments(node)["v"]] if is_call(node, xf.attention) else node.all_input_nodes

    def _sum_beside(self, node: fx.Node) -> fx.Node | None:
        """Return the sum that a fused norm's first result is the norm of, where that sum is one of the stops."""
        if node.target is not operator.getitem or not is_call(node.args[0], xf.add_layer_norm, xf.add_rms_norm):
            return None
        return next((user for user in node.args[0].users if user is not node and user in self.stops), None)

    def run(self, last: fx.Node, before: fx.Node, samples: torch.Tensor) -> torch.Tensor:
        """Return what ``last`` is for tokens ``samples`` of ``before``."""
        values: dict[fx.Node, Any] = {before: samples}

        def known(node: fx.Node) -> Any:
            return self.program.parameters[str(node.target)].double() if node.op == "get_attr" else values[node]

        with torch.no_grad():
            for node in self.order:
                if (total := self._sum_beside(node)) is not None:
                    values[node] = self._norm_of(node, known(total))
                elif is_call(node, xf.attention):
                    values[node] = _own_values(node, known(arguments(node)["v"]))
                else:
                    args, kwargs = fx.map_arg(node.args, known), fx.map_arg(node.kwargs, known)
                    values[node] = call(node.target, args, kwargs)
        found: torch.Tensor = values[last]
        return found

    def _norm_of(self, node: fx.Node, total: torch.Tensor) -> torch.Tensor:
        """Return the first result of the fused norm behind ``node`` for a sum that is known."""
        norm = node.args[0]
        assert isinstance(norm, fx.Node)
        given = arguments(norm)
        affine = [
            None if given[name] is None else self.program.parameters[str(given[name].target)].double()
            for name in ("weight", "bias")
            if name in given
        ]
        result = call(norm.target, (total, torch.zeros_like(total), *affine), {"eps": given["eps"]})
        normed: torch.Tensor = result[0]
        return normed


def _own_values(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Return each token's own value, for every head that reads it."""
    given = arguments(node)
    heads = value.reshape(*value.shape[:-1], given["kv_heads"], -1)
    return heads.repeat_interleave(given["heads"] // given["kv_heads"], -2).flatten(-2)


def _is_token_wise(node: fx.Node) -> bool:
    target = node.target
    if is_call(node, xf.attention, xf.glu, *(getattr(xf, name) for name in _TOKEN_WISE)):
        return True
    if target in _TOKEN_WISE_ATEN:
        return target is operator.getitem or int(arguments(node).get("dim", 0)) in (-1, 2)
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _compared(node: fx.Node, product: torch.Tensor, longest: _Longest) -> Defect:
    left, values, _ = torch.linalg.svd(product)
    direction = left[:, 0]
    tokens = longest.outlying
    cosines = (tokens @ direction).abs() / torch.linalg.vector_norm(tokens, dim=1)
    return Defect(
        value=node.name,
        path=path_of(node) or f"%{node.name}",
        direction=direction,
        dominance=float(values[0] / values[1]),
        norm_ratio=float(torch.cat(longest.norms).max()) / longest.median,
        alignment=float(cosines.mean()),
    )
