"""What linear layers see on calibration data: the second moments of values, as many at a time as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.passes.samples import valid_rows
from xformopt.program import Program, interpret, value_of

__all__ = ["Seen", "gram_matrices"]

# what the matrices of one run over the data may take; more values than fit take further runs
_GRAM_BYTES = 1 << 30


@dataclass
class Seen:
    """What is known of a value ``[..., C]`` from calibration data.

    Attributes:
        gram: ``X^T X`` over all valid positions, float64 ``[C, C]``.
        magnitude: The sum of ``|X|`` over them, float64 ``[C]``.
        count: How many positions.

    """

    gram: torch.Tensor
    magnitude: torch.Tensor
    count: int = 0


def gram_matrices(
    program: Program,
    batches: Sequence[Mapping[str, torch.Tensor]],
    names: Sequence[str],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[dict[str, Seen]]:
    """Yield what is seen of the values in ``names``, of as many at a time as memory allows.

    Args:
        program: What to run.
        batches: Named inputs.
        names: Of graph values ``[..., C]``.
        progress: Called with (what, done, total).

    Yields:
        What was seen, by name.

    Raises:
        DataError: there are no batches, or a value is not finite.

    """
    if not batches:
        raise DataError(
            "What layers see is collected on calibration data, and there is none. Give some with --calibration (or "
            "calibration=... in Python), or choose the option that needs none."
        )
    widths = {node.name: int(value_of(node).shape[-1]) for node in program.graph.nodes if node.name in set(names)}
    parts = _fitting(widths)
    for index, part in enumerate(parts):
        progress("collecting layer inputs", index, len(parts))
        seen = {name: Seen(_zeros(widths[name], widths[name]), _zeros(widths[name])) for name in part}
        for batch in batches:
            interpret(program, batch, observe=_adding(program, batch, seen))
        yield seen


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _fitting(widths: Mapping[str, int]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    room = _GRAM_BYTES
    for name, width in widths.items():
        needed = 8 * width * width
        if parts[-1] and needed > room:
            parts.append([])
            room = _GRAM_BYTES
        parts[-1].append(name)
        room -= needed
    return parts


def _adding(
    program: Program, batch: Mapping[str, torch.Tensor], seen: Mapping[str, Seen]
) -> Callable[[fx.Node, Any], None]:
    def observe(node: fx.Node, value: Any) -> None:
        if node.name not in seen:
            return
        rows = valid_rows(program, batch, node, value).double()
        found = seen[node.name]
        found.gram += rows.t() @ rows
        found.magnitude += rows.abs().sum(0)
        found.count += len(rows)

    return observe
