"""What the ONNX forms of sparse attention share: hidden logits, and softmax in parts that are added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xformopt.kernels.onnx_form import Builder

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Weighted", "bounded", "distances", "hide", "lowest", "mean_of", "weighted"]

# by the bytes of a number: far below any logit, and what the largest logit of a row counts as at least
_HIDDEN = {2: -6.0e4, 4: -1.0e30, 8: -1.0e30}
_LOWEST = {2: -3.0e4, 4: -1.0e20, 8: -1.0e20}


class Weighted(NamedTuple):
    """Values ``[..., E]`` and their weights ``[..., 1]``, both over ``exp(peak)``, the peak ``[..., 1]``."""

    values: ir.Value
    weights: ir.Value
    peak: ir.Value


def distances(b: Builder, length: ir.Value) -> ir.Value:
    """Return ``i - j`` at ``[i, j]``, for a length that is known at run time."""
    zero, one = b.constant(0, np.int64), b.constant(1, np.int64)
    at = b.op("Range", zero, b.op("Squeeze", length), one)
    return b.op("Sub", b.op("Unsqueeze", at, b.constant([1], np.int64)), at)


def hide(b: Builder, logits: ir.Value, visible: ir.Value, like: ir.Value) -> ir.Value:
    """Bring the logits of keys that are not visible far below all others; ``visible`` may be broadcast."""
    hidden = b.scalar(_HIDDEN[_bytes(like)], like)
    return b.op("Add", logits, b.op("Where", visible, b.scalar(0.0, like), hidden))


def bounded(b: Builder, bias: ir.Value, like: ir.Value) -> ir.Value:
    """Return a bias without minus infinity: a whole row of that has no softmax."""
    return b.op("Max", bias, b.scalar(_HIDDEN[_bytes(like)], like))


def lowest(b: Builder, like: ir.Value) -> ir.Value:
    """Return what the largest logit of a row counts as at least, above every logit that is hidden."""
    return b.scalar(_LOWEST[_bytes(like)], like)


def weighted(b: Builder, logits: ir.Value, values: ir.Value, like: ir.Value) -> Weighted:
    """Return the sums over the last axis of hidden logits ``[..., K]`` with values ``[..., K, E]``.

    A row in which every logit is hidden weighs nothing.
    """
    last = b.constant([-1], np.int64)
    peak = b.op("Max", b.op("ReduceMax", logits, last, keepdims=1), lowest(b, like))
    weights = b.op("Exp", b.op("Sub", logits, peak))
    return Weighted(b.op("MatMul", weights, values), b.op("ReduceSum", weights, last, keepdims=1), peak)


def mean_of(b: Builder, like: ir.Value, *parts: Weighted) -> ir.Value:
    """Return the weighted mean over all parts; zeros where they weigh nothing."""
    peak = b.op("Max", *(part.peak for part in parts))
    factors = [b.op("Exp", b.op("Sub", part.peak, peak)) for part in parts]
    values = [b.op("Mul", factor, part.values) for factor, part in zip(factors, parts, strict=True)]
    weights = [b.op("Mul", factor, part.weights) for factor, part in zip(factors, parts, strict=True)]
    total = b.op("Max", b.op("Sum", *weights), b.scalar(_tiny(like), like))
    return b.op("Div", b.op("Sum", *values), total)


def _bytes(like: ir.Value) -> int:
    assert like.dtype is not None
    return int(like.dtype.itemsize)


def _tiny(like: ir.Value) -> float:
    assert like.dtype is not None
    return float(np.finfo(like.dtype.numpy()).tiny)
