"""Inputs for a Program at chosen sizes: random values within the specs, and padding on either side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from xformopt.program.program import Input, Program

__all__ = ["Padding", "example_sizes", "is_mask", "sample_inputs", "valid_positions"]

Padding = Literal["none", "left", "right"]


def example_sizes(program: Program, *, batch: int | None = None, length: int | None = None) -> dict[str, int]:
    """Return the size of every dimension in the example inputs, with batch and length replaced where given."""
    sizes = {name: min(max(2, program.dims[name].low), program.dims[name].high or 2) for name in program.dims.names}
    if program.example_inputs:
        sizes |= program.bind(program.example_inputs)
    wanted = {"batch": batch, "length": length}
    sizes |= {name: size for name, size in wanted.items() if size is not None and name in program.dims}
    program.dims.check_sizes(sizes, program.name)
    return sizes


def is_mask(spec: Input) -> bool:
    """Whether an input says of every position whether it counts: ``[B, T]``, boolean or integer, named a mask."""
    return "mask" in spec.name and len(spec.shape) == 2 and not spec.dtype.is_floating_point


def sample_inputs(
    program: Program, sizes: Mapping[str, int], *, seed: int = 0, padding: Padding = "none"
) -> dict[str, torch.Tensor]:
    """Draw inputs: integers below their bound, floats from a normal distribution, masks with about a third padded.

    The first row of a mask is always full, so that the longest length is really met.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for spec in program.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if is_mask(spec):
            drawn[spec.name] = _mask(program, spec, shape, padding)
        elif spec.dtype.is_floating_point:
            drawn[spec.name] = torch.randn(shape, generator=generator).to(spec.dtype)
        elif spec.dtype == torch.bool:
            drawn[spec.name] = torch.ones(shape, dtype=torch.bool)
        else:
            drawn[spec.name] = torch.randint(0, _bound(program, spec), shape, generator=generator).to(spec.dtype)
    return drawn


def _bound(program: Program, spec: Input) -> int:
    if spec.bound is not None:
        return spec.bound
    example = program.example_inputs.get(spec.name)
    return int(example.max()) + 1 if example is not None and example.numel() else 2


def _mask(program: Program, spec: Input, shape: list[int], padding: Padding) -> torch.Tensor:
    B, T = shape
    # row b loses b thirds of a third of its positions, and keeps at least one
    lost = torch.arange(B).unsqueeze(1) * max(T // 3, 1) % max(T, 1) if padding != "none" else torch.zeros(B, 1)
    if padding != "none" and B == 1:
        lost = torch.full((1, 1), T // 3)
    positions = torch.arange(T).unsqueeze(0)
    kept = positions >= lost if padding == "left" else positions < T - lost
    means = next((output.mask_means for output in program.outputs if output.mask == spec.name), "keep")
    return (kept if means == "keep" else ~kept).to(spec.dtype)


def valid_positions(program: Program, value: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return which elements of a value count, broadcastable to it, or None where all do.

    Args:
        program: Names the padding mask in its outputs.
        value: The fake tensor of the value, whose axes are recognized by their dimensions.
        inputs: The inputs it was computed from.
    """
    output = next((output for output in program.outputs if output.mask), None)
    if output is None:
        return None
    spec = next(spec for spec in program.inputs if spec.name == output.mask)
    axes = [str(size) for size in program.dims.shape(value)]
    if not all(str(size) in axes for size in spec.shape):
        return None
    batch_axis, length_axis = (axes.index(str(size)) for size in spec.shape)
    if batch_axis == length_axis:
        return None
    kept = inputs[spec.name] != 0
    kept = kept if output.mask_means == "keep" else ~kept
    kept = kept if batch_axis < length_axis else kept.t()
    shape = [1] * len(axes)
    shape[batch_axis], shape[length_axis] = inputs[spec.name].shape
    return kept.reshape(shape)
