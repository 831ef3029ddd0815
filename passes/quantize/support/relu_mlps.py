"""MLPs whose GELU becomes a ReLU, with both of their layers trained anew: the MLP reconstruction of APHQ-ViT.

Each MLP is trained to give what it gave, on

    mean(H (O_relu - O)^2) + 2 mean(H (O_clamped - O)^2)

with H the importance of the block's output, and O_clamped computed with hidden activations cut at u, the 98th
percentile of the original's positive ones: what quantizers will cut later does not hurt then (Wu et al., APHQ-ViT, CVPR
2025, arXiv 2504.02508).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from xformopt.match import arguments, is_call, operand, xf
from xformopt.pipeline import Context
from xformopt.program import Program, interpret, path_of
from xformopt.reconstruction import Attempt, Free, Reconstruction, Settings, Transform, cut_at, reconstruct
from xformopt.rewrite import Editor

__all__ = ["Mlp", "find_mlps", "reconstruct_mlps"]

_REPLACED = frozenset({"gelu", "gelu_tanh", "gelu_quick"})
_KEPT_SHARE, _CLAMPED_WEIGHT = 0.98, 2.0
# of one activation in one batch, at most so many values are looked at for the percentile
_LOOKED_AT = 1 << 18


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with a GELU between them, by the names of their values.

    Attributes:
        path: Where in the source model.
        source: What the first layer reads.
        hidden: The activation.
        result: What the second layer returns.
        parameters: Weights and biases of both layers.

    """

    path: str
    source: str
    hidden: str
    result: str
    parameters: tuple[str, ...]


def find_mlps(program: Program) -> list[Mlp]:
    """Return the MLPs with a GELU whose values nothing else reads and whose parameters are theirs alone."""
    found = [_mlp(node) for node in program.nodes() if is_call(node, xf.linear)]
    return [mlp for mlp in found if mlp is not None]


def _mlp(last: fx.Node) -> Mlp | None:
    hidden = operand(last)
    if not is_call(hidden, xf.activation, xf.linear_activation) or arguments(hidden)["function"] not in _REPLACED:
        return None
    first = operand(hidden) if is_call(hidden, xf.activation) else hidden
    if not is_call(first, xf.linear, xf.linear_activation) or any(len(node.users) > 1 for node in (first, hidden)):
        return None
    read = [arguments(node)[name] for node in (first, last) for name in ("weight", "bias")]
    parameters = [node for node in read if node is not None]
    if any(node.op != "get_attr" or len(node.users) > 1 for node in parameters):
        return None
    names = tuple(str(node.target) for node in parameters)
    return Mlp(path_of(hidden), operand(first).name, hidden.name, last.name, names)


def reconstruct_mlps(
    program: Program,
    context: Context,
    mlps: Sequence[Mlp],
    importance: Mapping[str, torch.Tensor],
    settings: Settings,
    describes: Sequence[object],
) -> tuple[Program, Reconstruction]:
    """Return the program with ReLU in ``mlps`` and their layers trained.

    Args:
        program: A lifted program.
        context: Of the pass.
        mlps: Of the program.
        importance: H by the name of an MLP's result.
        settings: How to train.
        describes: See :func:`xformopt.reconstruction.reconstruct`.

    """
    changed, relus = _with_relu(program, mlps)
    ends = {relus[hidden]: end for hidden, end in _ends(program, context, mlps).items()}
    cuts = [cut for mlp in mlps for cut in ((f"before {mlp.path}", [mlp.source]), (mlp.path, [mlp.result]))]

    def clamp(node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        return value.clamp(max=ends[node.name]) if node.name in ends else value

    found = reconstruct(
        program,
        changed,
        context.calibration,
        {name: partial(Free, changed.parameters[name]) for mlp in mlps for name in mlp.parameters},
        settings,
        describes=("mlps", *describes),
        blocks=cut_at(program, cuts),
        weights=importance,
        objective=partial(_objective, clamp),
        progress=context.progress,
    )
    changed.parameters = {**changed.parameters, **found.results}
    return changed, found


def _objective(clamp: Transform, attempt: Attempt) -> torch.Tensor:
    return attempt.error(attempt.run(None)) + _CLAMPED_WEIGHT * attempt.error(attempt.run(clamp))


def _with_relu(program: Program, mlps: Sequence[Mlp]) -> tuple[Program, dict[str, str]]:
    """Return the program with ReLU in ``mlps``, and the name of each ReLU by that of the GELU."""
    changed = program.copy()
    editor, chosen = Editor(changed), {mlp.hidden for mlp in mlps}
    made: dict[str, str] = {}
    for node in [node for node in changed.nodes() if node.name in chosen]:
        given = [value for name, value in arguments(node).items() if name != "function"]
        editor.at(node)
        before = editor.call(xf.linear, *given) if is_call(node, xf.linear_activation) else operand(node)
        relu = editor.call(xf.activation, before, function="relu")
        relu.meta["path"] = path_of(node)
        node.replace_all_uses_with(relu)
        changed.graph.erase_node(node)
        made[node.name] = relu.name
    return changed, made


def _ends(program: Program, context: Context, mlps: Sequence[Mlp]) -> dict[str, float]:
    """Return the percentile of each MLP's positive activations, by the name of its GELU."""
    seen: dict[str, list[torch.Tensor]] = {mlp.hidden: [] for mlp in mlps}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in seen:
            values = value[value > 0]
            seen[node.name].append(values[:: max(1, len(values) // _LOOKED_AT)])

    for batch in context.calibration:
        interpret(program, batch, observe=observe)
    return {name: _percentile(torch.cat(values)) for name, values in seen.items()}


def _percentile(values: torch.Tensor) -> float:
    """Return the value that so many are not above; infinite where there are none."""
    if not len(values):
        return float("inf")
    return float(values.kthvalue(max(1, round(_KEPT_SHARE * len(values)))).values)
