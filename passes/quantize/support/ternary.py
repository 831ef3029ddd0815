"""What passes on binary and ternary layers share: codes, and the first scale of elastic activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xformopt.errors import DataError
from xformopt.kernels.packing import pack
from xformopt.kernels.ternary_weight import statistics, ternary_weight
from xformopt.program import Program, interpret, valid_positions

__all__ = ["Elastic", "elastic_ranges", "packed_levels"]


def packed_levels(weight: torch.Tensor, *, bits: int, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes ``[O, bytes]`` and scales ``[O]`` or ``[1]`` of ``xf.ternary_linear``."""
    _, scale = statistics(weight, bits=bits, per_row=per_row)
    rounded = ternary_weight(weight, bits=bits, per_row=per_row)
    level = torch.sign(rounded)
    codes = (level + 1) / 2 if bits == 1 else level + 1
    return pack(codes.to(torch.uint8), bits), scale.flatten().clone()


@dataclass(frozen=True)
class Elastic:
    """Scale (a scalar, to be learned) and zero point (uint8, a scalar) of activations."""

    scale: torch.Tensor
    zero: torch.Tensor


@dataclass
class _Magnitude:
    """What is remembered of one value."""

    total: float = 0.0
    count: int = 0
    low: float = 0.0


def elastic_ranges(
    program: Program, batches: Sequence[Mapping[str, torch.Tensor]], names: Iterable[str], *, bits: int
) -> dict[str, Elastic]:
    """Return the first scales ``2 mean|x| / sqrt(Qp)`` (Esser et al., LSQ, arXiv 1902.08153) of values in ``names``.

    Values that are never negative get the codes from 0, ``Qp = 2^bits - 1``; others those on both sides of zero.

    Raises:
        DataError: there are no batches.

    """
    if not batches:
        raise DataError(
            "The scales of activations start from calibration data, and there is none. Give some with --calibration "
            "(or calibration=... in Python), or leave activations in float with activation_bits=none."
        )
    seen = {name: _Magnitude() for name in names}
    for batch in batches:
        interpret(program, batch, observe=_adding(program, batch, seen))
    return {name: _elastic(found, bits) for name, found in seen.items()}


def _adding(
    program: Program, batch: Mapping[str, torch.Tensor], seen: Mapping[str, _Magnitude]
) -> Callable[[fx.Node, Any], None]:
    def observe(node: fx.Node, value: Any) -> None:
        if (found := seen.get(node.name)) is None:
            return
        valid = valid_positions(program, node.meta["val"], batch)
        kept = value if valid is None else value[valid.expand(value.shape)]
        found.total += float(kept.abs().double().sum())
        found.count += kept.numel()
        found.low = min(found.low, float(kept.amin()))

    return observe


def _elastic(found: _Magnitude, bits: int) -> Elastic:
    middle = 2 ** (bits - 1)
    zero, last = (middle, middle - 1) if found.low < 0 else (0, 2**bits - 1)
    scale = 2 * found.total / max(found.count, 1) / last**0.5
    return Elastic(torch.tensor(scale or 1.0), torch.tensor(zero, dtype=torch.uint8))
