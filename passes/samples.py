"""Values seen on calibration data: a few rows of each, or moments of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.program import Program, interpret, path_of, valid_positions

__all__ = ["check_finite", "sample_items", "sample_rows", "valid_rows"]

# rows of each value that are kept, over all batches
_ROWS = 1024
# items of a batch that are kept whole
_ITEMS = 4
NO_DATA = (
    "Ranges of activations are found on calibration data, and there is none. Give some with --calibration "
    "(or calibration=... in Python)."
)


def sample_rows(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], names: Iterable[str], *, rows: int = _ROWS
) -> dict[str, torch.Tensor]:
    """Run ``program`` on calibration batches and return rows of the values in ``names``, ``[N, C]`` each.

    They are spread evenly over all positions that are valid; no more than ``rows`` in all.  A value whose rows are not
    equally long in all batches (weights of attention, over sequences of several lengths) comes as one column,
    ``[N, 1]``.

    Raises:
        DataError: no batches, or a value that is NaN or infinite.

    """
    if not batches:
        raise DataError(NO_DATA)
    wanted = frozenset(names)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    share = max(1, rows // len(batches))
    for batch in batches:
        interpret(program, batch, observe=_keeping(program, batch, kept, share))
    return {name: _joined(parts, rows) for name, parts in kept.items()}


def _joined(parts: list[torch.Tensor], rows: int) -> torch.Tensor:
    if len({part.shape[1] for part in parts}) == 1:
        return torch.cat(parts)[:rows]
    return torch.cat([part.reshape(-1, 1) for part in parts])


def _keeping(
    program: Program, batch: Mapping[str, torch.Tensor], kept: Mapping[str, list[torch.Tensor]], share: int
) -> Callable[[fx.Node, Any], None]:
    def observe(node: fx.Node, value: Any) -> None:
        if node.name in kept:
            found = valid_rows(program, batch, node, value)
            places = torch.linspace(0, len(found) - 1, min(share, len(found))).round().long()
            kept[node.name].append(found[places])

    return observe


def valid_rows(program: Program, batch: Mapping[str, torch.Tensor], node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Return the rows of a value that are not padding, ``[N, C]``.

    Raises:
        DataError: one holds NaN or infinite values.

    """
    valid = valid_positions(program, node.meta["val"], batch)
    if valid is not None and valid.shape[-1] == 1:
        value = value[valid.expand(*value.shape[:-1], 1).squeeze(-1)]
    rows = value.reshape(-1, value.shape[-1])
    check_finite(rows, path_of(node) or node.name)
    return rows


def check_finite(value: torch.Tensor, path: str) -> None:
    """Raise DataError where a value is not finite."""
    if not bool(value.isfinite().all()):
        raise DataError(
            f"On the calibration data, {path} computes values that are NaN or infinite, so they have no range. Look "
            f"for the cause in the data or the model."
        )


def sample_items(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], names: Iterable[str], *, items: int = _ITEMS
) -> dict[str, torch.Tensor]:
    """Run ``program`` on the first calibration batch and return whole items of the values in ``names``, padding too.

    Raises:
        DataError: no batches, or a value that is NaN or infinite.

    """
    if not batches:
        raise DataError(NO_DATA)
    wanted = frozenset(names)
    kept: dict[str, torch.Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in wanted:
            kept[node.name] = value[:items]
            check_finite(kept[node.name], path_of(node) or node.name)

    interpret(program, batches[0], observe=observe)
    return kept
