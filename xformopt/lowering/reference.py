"""Inputs a lowered program is tried on, and how far its answers are from the eager ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from xformopt.errors import DataError
from xformopt.program import Input, Program

__all__ = ["TOLERANCE", "largest_gap", "reference_inputs", "relative_l2"]

# relative L2 that an exact lowering may differ from the eager program, by the program's arithmetic; in integers, what
# lies between two codes may be rounded to either, and every layer after it magnifies that: end to end only gross faults
# stand out, so the forms of integer operators are held to 3e-6 one by one, in their tests
TOLERANCE = {"fp64": 1e-5, "fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.3}
_DEFAULT_SIZE = 128


def reference_inputs(
    program: Program, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return inputs at the given sizes: the program's examples, repeated or cut, or else drawn from ``seed``.

    Sizes left out are those of the examples; without examples a leading dimension is 1 and others are at most 128.

    Raises:
        DataError: there is no such dimension, or the size is out of its range.

    """
    wanted = _default_sizes(program)
    for name, size in (sizes or {}).items():
        if name not in program.dims:
            raise DataError(
                f"There is no dimension {name!r}; {program.name} has {', '.join(program.dims.names) or 'none'}."
            )
        if not program.dims[name].admits(size):
            raise DataError(f"The size {size} is outside of {program.dims[name]}. Choose one inside.")
        wanted[name] = size
    generator = torch.Generator().manual_seed(seed)
    masks = {output.mask for output in program.outputs}
    return {spec.name: _one_input(program, spec, wanted, spec.name in masks, generator) for spec in program.inputs}


def _default_sizes(program: Program) -> dict[str, int]:
    if program.example_inputs:
        return program.bind(program.example_inputs)
    sizes: dict[str, int] = {}
    for dim in program.dims:
        is_leading = any(spec.shape[:1] == (dim.name,) for spec in program.inputs)
        sizes[dim.name] = max(dim.low, 1 if is_leading else program.dims.largest(dim.name, _DEFAULT_SIZE))
    return sizes


def _one_input(
    program: Program, spec: Input, sizes: Mapping[str, int], is_mask: bool, generator: torch.Generator
) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    example = program.example_inputs.get(spec.name)
    if example is not None:
        for axis, size in enumerate(shape):
            if example.shape[axis] != size:
                example = example.index_select(axis, torch.arange(size) % example.shape[axis])
        return example.contiguous()
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if is_mask or "mask" in spec.name or spec.dtype == torch.bool:
        return torch.ones(shape, dtype=spec.dtype)
    return torch.randint(0, spec.bound or 1, shape, generator=generator).to(spec.dtype)


def largest_gap(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, np.ndarray],
) -> tuple[str, float]:
    """Return the output that differs most, and its relative L2 on valid positions (infinite where shapes differ)."""
    gaps: dict[str, float] = {}
    for spec in program.outputs:
        want, have = expected[spec.name].detach(), torch.from_numpy(np.array(found[spec.name]))
        if want.shape != have.shape:
            return spec.name, float("inf")
        if spec.mask is not None and want.shape[:2] == inputs[spec.mask].shape:
            keep = inputs[spec.mask].bool() if spec.mask_means == "keep" else ~inputs[spec.mask].bool()
            want, have = want[keep], have[keep]
        gaps[spec.name] = relative_l2(want, have)
    worst = max(gaps, key=lambda name: gaps[name])
    return worst, gaps[worst]


def relative_l2(want: torch.Tensor, have: torch.Tensor) -> float:
    """Return ``|have - want| / |want|`` in double precision; infinite where ``have`` is not finite but ``want`` is."""
    want, have = want.double(), have.double()
    # equal infinities are no difference
    same = want == have
    difference = torch.where(same, 0.0, have - want)
    gap = difference.norm() / torch.where(same & want.isinf(), 0.0, want).norm().clamp(min=1e-30)
    return float("inf") if bool(gap.isnan()) else float(gap)
