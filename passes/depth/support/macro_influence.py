"""Macro Influence: what a layer does to the last hidden state (Pei et al., FuseGPT, arXiv 2411.14507).

    MI_i = 1 - mean over positions of cos(h(x), h_i(x))

h is the last hidden state of the whole model, h_i that of the model without layer i.  Padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.passes.answers import valid_rows
from xformopt.passes.depth.support.layers import Layer, hidden_state
from xformopt.passes.replay import Replay
from xformopt.program import Program, interpret

__all__ = ["macro_influence", "require_calibration", "state_distance"]

_Batch = Mapping[str, torch.Tensor]


def require_calibration(batches: Sequence[_Batch]) -> None:
    """Raise DataError where there is nothing to look at."""
    if not batches:
        raise DataError(
            "What a layer is worth is measured on calibration data, and there is none. Give some with --calibration "
            "(or calibration=... in Python)."
        )


def macro_influence(
    program: Program,
    layers: Sequence[Layer],
    batches: Sequence[_Batch],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[Layer, float]:
    """Return the Macro Influence of each of a program's layers; only what follows a layer is computed again."""
    named = {node.name: node for node in program.graph.nodes}
    hidden = named[hidden_state(program, layers)]
    sums = dict.fromkeys(layers, 0.0)
    rows = 0
    for done, batch in enumerate(batches):
        progress("measuring layers", done, len(batches))
        replay = Replay(program, batch)
        whole = valid_rows(program, hidden.meta["val"], replay.values[hidden], batch)
        rows += len(whole)
        for layer in layers:
            result = named[layer.result]
            found = replay.run(result, replay.values[named[layer.stream]], 1, [hidden])[hidden]
            sums[layer] += _distances(whole, valid_rows(program, hidden.meta["val"], found, batch))
    return {layer: total / rows for layer, total in sums.items()}


def state_distance(one: Program, other: Program, names: tuple[str, str], batches: Sequence[_Batch]) -> float:
    """Return 1 less the mean cosine of a value of one program and a value of another, by their names."""
    total, rows = 0.0, 0
    for batch in batches:
        first, second = (_rows(program, name, batch) for program, name in zip((one, other), names, strict=True))
        total += _distances(first, second)
        rows += len(first)
    return total / rows


def _rows(program: Program, name: str, batch: _Batch) -> torch.Tensor:
    found: dict[str, torch.Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name == name:
            found[name] = valid_rows(program, node.meta["val"], value, batch)

    interpret(program, batch, observe=observe)
    return found[name]


def _distances(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((1 - torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1)).sum())
