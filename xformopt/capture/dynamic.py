"""Which axes of which inputs vary: the user's hints, the defaults, and examples large enough to trace with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from xformopt.errors import CaptureError
from xformopt.program import Dim

__all__ = ["Axes", "DynamicSpec", "enlarge", "resolve_axes"]

# {"input_ids": {0: "batch", 1: ("length", 1, 512)}}
DynamicSpec: TypeAlias = Mapping[str, Mapping[int, str | tuple[str, int, int | None]]]


@dataclass(frozen=True)
class Axes:
    """The varying axes: ``named`` maps (input, axis) to a dimension name, ``dims`` gives the stated ranges."""

    named: Mapping[tuple[str, int], str]
    dims: Mapping[str, Dim]
    stated: bool


def resolve_axes(examples: Mapping[str, torch.Tensor], dynamic: DynamicSpec | None) -> Axes:
    """Return the varying axes: as stated, or batch everywhere and length on the second axis of integer inputs.

    An axis the user did not name follows a named one when it stands at the same place and has the same example size.
    """
    stated = dynamic if dynamic is not None else _default_axes(examples)
    named: dict[tuple[str, int], str] = {}
    dims: dict[str, Dim] = {}
    for name, axes in stated.items():
        if name not in examples:
            raise CaptureError(f"`dynamic` names the input {name!r}, but the model's inputs are {', '.join(examples)}.")
        for axis, hint in axes.items():
            dim = Dim(hint) if isinstance(hint, str) else Dim(*hint)
            if not 0 <= axis < examples[name].dim():
                raise CaptureError(f"`dynamic` names axis {axis} of {name}, which has {examples[name].dim()} axes.")
            named[name, axis] = dim.name
            if dim.name not in dims or not isinstance(hint, str):
                dims[dim.name] = dim
    _follow(examples, named)
    _check_sizes(examples, named, dims)
    return Axes(named, dims, dynamic is not None)


def _default_axes(examples: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    ranked = [value for value in examples.values() if value.dim() > 0]
    if not ranked:
        return {}
    batch = ranked[0].shape[0]
    axes: dict[str, dict[int, str]] = {}
    for name, value in examples.items():
        if value.dim() == 0 or value.shape[0] != batch:
            continue
        axes[name] = {0: "batch"}
        if value.dim() >= 2 and not value.is_floating_point():
            axes[name][1] = "length"
    lengths = {examples[name].shape[1] for name, found in axes.items() if 1 in found}
    if len(lengths) > 1:
        # inputs of different lengths (encoder and decoder) vary apart, each with its own mask
        owners: dict[int, str] = {}
        for name, found in axes.items():
            if 1 in found:
                owner = owners.setdefault(examples[name].shape[1], name)
                found[1] = f"{owner}_length"
    return axes


def _follow(examples: Mapping[str, torch.Tensor], named: dict[tuple[str, int], str]) -> None:
    leaders = {(axis, examples[name].shape[axis]): dim for (name, axis), dim in named.items()}
    for name, value in examples.items():
        if value.dim() > 3:
            # images: rows and columns are sizes of their own
            continue
        for axis, size in enumerate(value.shape[:2]):
            if (axis, size) in leaders:
                named.setdefault((name, axis), leaders[axis, size])


def _check_sizes(
    examples: Mapping[str, torch.Tensor], named: Mapping[tuple[str, int], str], dims: Mapping[str, Dim]
) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for (name, axis), dim in named.items():
        size = examples[name].shape[axis]
        first, where = sizes.setdefault(dim, (size, f"axis {axis} of {name}"))
        if first != size:
            raise CaptureError(
                f"The dimension {dim!r} has size {first} at {where} but {size} at axis {axis} of {name}: "
                f"one name must mean one size. Give them different names or equal example sizes."
            )
        if not dims[dim].admits(size):
            raise CaptureError(f"The example size {size} at axis {axis} of {name} lies outside of {dims[dim]}.")


def enlarge(examples: Mapping[str, torch.Tensor], axes: Axes) -> dict[str, torch.Tensor]:
    """Return examples whose varying sizes are at least 2 and unequal, so that tracing cannot mistake them.

    torch.export treats a size of 1 as a constant, and equal sizes as one symbol.
    """
    taken: dict[str, int] = {}
    for (name, axis), dim in axes.named.items():
        if dim in taken:
            continue
        size, high = examples[name].shape[axis], axes.dims[dim].high
        while size < 2 or size in taken.values():
            size += 1
        if high is not None and size > high:
            raise CaptureError(
                f"The dimension {axes.dims[dim]} leaves no size above 1 to trace with; leave it out of `dynamic`."
            )
        taken[dim] = size
    grown = {}
    for name, value in examples.items():
        for axis in range(value.dim()):
            if (name, axis) in axes.named:
                value = _grow(value, axis, taken[axes.named[name, axis]])
        grown[name] = value.contiguous()
    return grown


def _grow(value: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if value.shape[axis] == size:
        return value
    repeats = -(-size // value.shape[axis])
    return value.repeat_interleave(repeats, axis).narrow(axis, 0, size)
