"""Whether a Program may be run longer than its inputs, or a batch in parts: if what it computes stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from xformopt.lowering.manifest import specs_of
from xformopt.lowering.reference import largest_gap, reference_inputs
from xformopt.lowering.tvm_signature import Batching, Function, Padding, Signature
from xformopt.program import Program

__all__ = ["BATCH", "LENGTH", "batching_of", "padding_of"]

# the dimensions that a library may be compiled for several sizes of
LENGTH = "length"
BATCH = "batch"


def padding_of(
    program: Program, sizes: dict[str, int], lengths: Sequence[int], tolerance: float
) -> tuple[Padding | None, str]:
    """Return how inputs are padded, or None and why they cannot be.

    A padding mask is an input that says which positions of an output count.  Whether the model obeys it everywhere is
    tried: an input is run as it is and padded, and both must agree on the positions it has.

    Args:
        program: What is compiled.
        sizes: Of the other dimensions.
        lengths: What it is compiled for, rising.
        tolerance: Largest relative L2 between both.

    """
    masks = {spec.mask: spec.mask_means for spec in program.outputs if spec.mask is not None}
    if not masks:
        return None, "the model has no padding mask"
    inputs = {}
    for spec in program.inputs:
        axes = [axis for axis, size in enumerate(spec.shape) if size == LENGTH]
        if len(axes) > 1:
            return None, f"the input {spec.name} has the length twice"
        if axes:
            hides_by_one = spec.name in masks and masks[spec.name] != "keep"
            inputs[spec.name] = axes[0], int(hides_by_one)
    outputs = {}
    for output in specs_of(program)["outputs"]:
        for axis, size in enumerate(output.shape):
            if size == LENGTH:
                outputs[output.name] = axis
            elif LENGTH in str(size):
                return None, f"the output {output.name} is {size} long"
    padding = Padding(inputs, outputs)
    gap = _gap(program, sizes, lengths, padding)
    if not gap <= tolerance:
        return None, f"what is padded changes the model's answer by {gap:.1e}, though it has a padding mask"
    return padding, ""


def _gap(program: Program, sizes: dict[str, int], lengths: Sequence[int], padding: Padding) -> float:
    """Return the relative L2 between an input padded to the longest, and the input as it is."""
    longest = lengths[-1]
    shorter = lengths[-2] + 1 if len(lengths) > 1 else longest // 2
    shorter = max(min(shorter, longest - 1), program.dims[LENGTH].low)
    plain = reference_inputs(program, {**sizes, LENGTH: shorter})
    full = reference_inputs(program, {**sizes, LENGTH: longest})
    shapes = {name: list(full[name].shape) for name in program.input_names}
    signature = Signature((Function("", shapes, []),), tuple(program.output_names), padding)
    call = signature.choose({name: value.numpy() for name, value in plain.items()})
    padded = dict(zip(shapes, map(torch.from_numpy, call.inputs), strict=True))
    found = program.run(padded)
    arrays: list[np.ndarray] = [found[name].detach().numpy() for name in program.output_names]
    expected = {name: value.detach() for name, value in program.run(plain).items()}
    return largest_gap(program, plain, expected, signature.cut(call, arrays))[1]


def batching_of(
    program: Program, sizes: dict[str, int], batches: Sequence[int], tolerance: float
) -> tuple[Batching | None, str]:
    """Return how a batch is cut into parts of compiled sizes, or None and why it cannot be.

    Whether a model looks at each item by itself is tried: a batch is run as a whole and in parts, and both must agree.

    Args:
        program: What is compiled.
        sizes: Of the other dimensions.
        batches: What it is compiled for, rising.
        tolerance: Largest relative L2 between both.

    """
    items = []
    for spec in program.inputs:
        axes = [axis for axis, size in enumerate(spec.shape) if BATCH in str(size)]
        if axes and (axes != [0] or spec.shape[0] != BATCH):
            return None, f"the input {spec.name} has the batch elsewhere than on its first axis"
        if axes:
            items.append(spec.name)
    for output in specs_of(program)["outputs"]:
        if not output.shape or output.shape[0] != BATCH or any(BATCH in str(size) for size in output.shape[1:]):
            return None, f"the output {output.name} does not have an item for each place of its first axis"
    batching = Batching(tuple(items), tuple(batches))
    gap = _gap_of_parts(program, sizes, batching)
    if not gap <= tolerance:
        return None, f"in parts the model answers otherwise, by {gap:.1e}: its items depend on each other"
    return batching, ""


def _gap_of_parts(program: Program, sizes: dict[str, int], batching: Batching) -> float:
    """Return the relative L2 between a batch run in parts, and as it is."""
    high = program.dims[BATCH].high
    count = batching.sizes[-1] + 1 if high is None else min(batching.sizes[-1] + 1, int(high))
    whole = reference_inputs(program, {**sizes, BATCH: count})

    def once(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = program.run({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()})
        return {name: value.detach().numpy() for name, value in found.items()}

    signature = Signature((), tuple(program.output_names), batching=batching)
    parts = signature.run({name: value.numpy() for name, value in whole.items()}, once)
    expected = {name: value.detach() for name, value in program.run(whole).items()}
    return largest_gap(program, whole, expected, parts)[1]
