"""Owns the comparison of a run's outputs with the reference, on valid positions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xformopt.errors import MeasurementError
from xformopt.measure.runner import Array

__all__ = ["Fidelity", "compare_outputs", "default_tolerance"]

# relative L2 beyond which a run computes something else than the reference; a lossy recipe states its own
_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 1e-1}
_LOSSY_TOLERANCE = 0.7


@dataclass(frozen=True)
class Fidelity:
    """How near the outputs are to the reference; of several outputs, the worst.

    `relative_l2` is |output - reference| / |reference|; `cosine` the mean over positions of the cosine along
    the last axis; `top1_agreement` the share of positions with the same largest entry. The latter two are
    None where no output has a last axis of two or more entries.
    """

    relative_l2: float
    cosine: float | None
    top1_agreement: float | None


def default_tolerance(precision: str) -> float:
    """Return the relative L2 up to which a run in `precision` passes parity when nothing else is said."""
    return _TOLERANCE.get(precision, _LOSSY_TOLERANCE)


def compare_outputs(
    outputs: Mapping[str, Array], reference: Mapping[str, Array], valid: Mapping[str, Array] | None = None
) -> Fidelity:
    """Compare outputs with the reference by name, or by position where the names differ.

    Args:
        outputs: What the run computed.
        reference: What it should have computed, of the same shapes.
        valid: For each output with padding, a boolean array over its leading axes (`[B, T]` for `[B, T, C]`)
            that says which positions count; an output without one counts whole.

    Raises:
        MeasurementError: An output is missing, has another shape, or is not finite where the reference is.

    """
    found = [
        _compare_one(name, output, reference[name], (valid or {}).get(name))
        for name, output in _paired(outputs, reference).items()
    ]
    cosines = [each.cosine for each in found if each.cosine is not None]
    agreements = [each.top1_agreement for each in found if each.top1_agreement is not None]
    return Fidelity(max(each.relative_l2 for each in found), min(cosines, default=None), min(agreements, default=None))


def _paired(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Array]:
    if not reference:
        raise MeasurementError("the reference has no outputs, so there is nothing to compare with.")
    if set(reference) <= set(outputs):
        return {name: outputs[name] for name in reference}
    if len(outputs) == len(reference):
        return dict(zip(reference, outputs.values(), strict=True))
    raise MeasurementError(
        f"the run has the outputs {', '.join(outputs) or '(none)'}, the reference {', '.join(reference)}. "
        "They must have the same names, or be as many in the same order."
    )


def _compare_one(name: str, output: Array, reference: Array, valid: Array | None) -> Fidelity:
    if output.shape != reference.shape:
        raise MeasurementError(
            f'the output "{name}" has the shape {list(output.shape)}, the reference {list(reference.shape)}.'
        )
    if valid is not None:
        if valid.shape != reference.shape[: valid.ndim]:
            raise MeasurementError(
                f'the valid positions of "{name}" have the shape {list(valid.shape)}, which is not that of '
                f"the leading axes of the output, {list(reference.shape)}."
            )
        output, reference = output[valid.astype(bool)], reference[valid.astype(bool)]
    if reference.size == 0:
        return Fidelity(0.0, None, None)
    got, wanted = np.asarray(output, np.float64), np.asarray(reference, np.float64)
    finite = np.isfinite(wanted)
    # a reference may hold infinities of its own (masked scores); they must be met, and then do not count
    if not np.array_equal(got[~finite], wanted[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        bad = int((~np.isfinite(got) & finite).sum())
        raise MeasurementError(
            f'the output "{name}" is not finite in {bad} of {wanted.size} places where the reference is, '
            "or finite where the reference is not."
        )
    got, wanted = np.where(finite, got, 0.0), np.where(finite, wanted, 0.0)
    return Fidelity(_relative_l2(got, wanted), *_along_last_axis(got, wanted))


def _relative_l2(got: Array, wanted: Array) -> float:
    norm = float(np.linalg.norm(wanted))
    difference = float(np.linalg.norm(got - wanted))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def _along_last_axis(got: Array, wanted: Array) -> tuple[float | None, float | None]:
    if wanted.ndim < 2 or wanted.shape[-1] < 2:
        return None, None
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1)
    products = (got * wanted).sum(axis=-1)
    # two zero vectors are the same vector
    both_zero = ~(got.any(axis=-1) | wanted.any(axis=-1))
    cosines = np.where(norms > 0, products / np.where(norms > 0, norms, 1.0), both_zero.astype(np.float64))
    agreement = np.mean(got.argmax(axis=-1) == wanted.argmax(axis=-1))
    return float(min(cosines.mean(), 1.0)), float(agreement)
