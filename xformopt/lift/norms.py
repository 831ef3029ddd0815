"""Lift layer norm and RMS norm, fused or written out, on the whole width or per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.layout import split_heads
from xformopt.lift.probe import Probe, is_movement, movement_chain, operator_name
from xformopt.program import shape_of, value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["absorb_affine", "lift_norm", "lift_written_norm", "merge_norm_heads"]

aten = torch.ops.aten
_NORMS = (xf.layer_norm, xf.rms_norm)


def lift_norm(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """``aten.layer_norm`` and ``aten.rms_norm`` over the last axis become xf operators."""
    name = operator_name(node)
    if node.target in _NORMS or name not in ("layer_norm", "rms_norm"):
        return None
    x, shape, *rest = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(shape, list | tuple)
    if len(shape) != 1:
        return Reject(f"the norm is over {len(shape)} axes")
    if name == "layer_norm":
        given = dict(zip(("weight", "bias", "eps"), rest, strict=False))
        affine = [given.get("weight"), given.get("bias")]
        while affine and affine[-1] is None:
            affine.pop()
        return editor.call(xf.layer_norm, x, *affine, eps=given.get("eps", 1e-5))
    given = dict(zip(("weight", "eps"), rest, strict=False))
    eps, weight = given.get("eps"), given.get("weight")
    eps = torch.finfo(value_of(x).dtype).eps if eps is None else eps
    return editor.call(xf.rms_norm, x, *([] if weight is None else [weight]), eps=eps)


def lift_written_norm(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``x * rsqrt(mean(x^2) + eps)`` and ``(x - mean) / sqrt(var + eps)``, in their usual spellings, without affine."""
    name = operator_name(node)
    if name == "div":
        centered, divisor = node.args
        if operator_name(divisor) != "sqrt":
            return None
    elif name == "mul":
        centered, divisor = node.args
        if operator_name(divisor) not in ("rsqrt",) and not _is_inverse_root(divisor):
            centered, divisor = divisor, centered
        if operator_name(divisor) != "rsqrt" and not _is_inverse_root(divisor):
            return None
    else:
        return None
    if not isinstance(centered, fx.Node) or not isinstance(divisor, fx.Node):
        return None
    moment = _plus_epsilon(editor, divisor.args[0])
    if moment is None:
        return None
    squares, eps = moment
    if (subject := _mean_square(squares)) is not None and subject is centered:
        mean = _mean_of(centered.args[1]) if operator_name(centered) == "sub" else None
        if mean is not None and mean is centered.args[0]:
            return editor.call(xf.layer_norm, mean, eps=eps)
        return editor.call(xf.rms_norm, centered, eps=eps)
    if operator_name(centered) == "sub" and _mean_of(centered.args[1]) is centered.args[0]:
        x = centered.args[0]
        if _variance_of(squares) is x:
            return editor.call(xf.layer_norm, x, eps=eps)
    return None


def _is_inverse_root(node: object) -> bool:
    return operator_name(node) == "pow" and isinstance(node, fx.Node) and bool(node.args[1] == -0.5)


def _plus_epsilon(editor: Editor, node: object) -> tuple[fx.Node, float] | None:
    """Read ``value + eps``."""
    if operator_name(node) != "add" or not isinstance(node, fx.Node):
        return None
    for value, eps in (node.args, node.args[::-1]):
        if isinstance(eps, fx.Node):
            constant = editor.constant(eps)
            eps = float(constant) if constant is not None and constant.numel() == 1 else None
        if isinstance(value, fx.Node) and isinstance(eps, float) and 0 <= eps < 1e-1:
            return value, eps
    return None


def _last_axis_kept(node: fx.Node, position: int) -> bool:
    axes = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    keep = node.args[position + 1] if len(node.args) > position + 1 else node.kwargs.get("keepdim", False)
    rank = value_of(node.args[0]).dim()  # type: ignore[arg-type]
    return axes in ([-1], [rank - 1], -1, rank - 1) and bool(keep)


def _mean_of(node: object) -> fx.Node | None:
    if operator_name(node) != "mean" or not isinstance(node, fx.Node) or not _last_axis_kept(node, 1):
        return None
    return node.args[0]  # type: ignore[return-value]


def _mean_square(node: fx.Node) -> fx.Node | None:
    squared = _mean_of(node)
    if operator_name(squared) == "pow" and squared.args[1] == 2:  # type: ignore[union-attr]
        return squared.args[0]  # type: ignore[union-attr, return-value]
    if operator_name(squared) == "square":
        return squared.args[0]  # type: ignore[union-attr, return-value]
    if operator_name(squared) == "mul" and squared.args[0] is squared.args[1]:  # type: ignore[union-attr]
        return squared.args[0]  # type: ignore[union-attr, return-value]
    return None


def _variance_of(node: fx.Node) -> fx.Node | None:
    """Read a biased variance over the last axis, or the mean square of deviations from the mean."""
    if operator_name(node) == "var":
        biased = node.kwargs.get("correction", 1) == 0 or node.kwargs.get("unbiased") is False
        if len(node.args) > 2 and node.args[2] is False:
            biased = True
        keep = node.kwargs.get("keepdim", node.args[3] if len(node.args) > 3 else False)
        axes = node.args[1] if len(node.args) > 1 else None
        subject = node.args[0]
        assert isinstance(subject, fx.Node)
        return subject if biased and keep and axes in ([-1], [value_of(subject).dim() - 1]) else None
    deviation = _mean_square(node)
    if operator_name(deviation) == "sub" and _mean_of(deviation.args[1]) is deviation.args[0]:  # type: ignore[union-attr]
        return deviation.args[0]  # type: ignore[union-attr]
    return None


def absorb_affine(editor: Editor, node: fx.Node) -> fx.Node | None:
    """A norm without weight times a constant vector has that weight; plus a constant vector, that bias."""
    name = operator_name(node)
    if name not in ("mul", "add") or node.kwargs:
        return None
    for norm, vector in (node.args, node.args[::-1]):
        if not isinstance(norm, fx.Node) or norm.target not in _NORMS or len(norm.users) > 1:
            continue
        if not isinstance(vector, fx.Node) or not _is_vector_parameter(editor, vector, norm):
            continue
        attributes: dict[str, Any] = dict(norm.kwargs)
        if name == "mul" and len(norm.args) == 1:
            return editor.call(norm.target, norm.args[0], vector, **attributes)
        if name == "add" and norm.target is _NORMS[0] and len(norm.args) < 3:
            weight = norm.args[1] if len(norm.args) > 1 else None
            return editor.call(norm.target, norm.args[0], weight, vector, **attributes)
    return None


def _is_vector_parameter(editor: Editor, node: fx.Node, norm: fx.Node) -> bool:
    """Whether a value is a vector of the norm's width that depends on parameters alone."""
    if tuple(value_of(node).shape) != (value_of(norm).shape[-1],) or norm.kwargs.get("groups", 1) != 1:
        return False
    return Probe(editor.program).run(node, {}) is not None


def merge_norm_heads(editor: Editor, node: fx.Node) -> fx.Node | None:
    """A norm on split heads becomes a norm with groups on ``[B, T, C]``, split afterwards."""
    if node.target not in _NORMS or node.kwargs.get("groups", 1) != 1 or value_of(node).dim() != 4:
        return None
    x = node.args[0]
    if not isinstance(x, fx.Node) or not is_movement(x):
        return None
    probe = Probe(editor.program)
    for axis in (1, 2):
        heads = shape_of(editor.program, x)[axis]
        if not isinstance(heads, int):
            continue
        # [B, H, T, D] as it is, or [B, T, H, D] turned so
        source = _source_of_heads(editor, probe, x, axis)
        if source is None:
            continue
        attributes: dict[str, Any] = {**node.kwargs, "groups": heads}
        merged = editor.call(node.target, source, *node.args[1:], **attributes)
        parts = split_heads(editor, merged, heads)
        return parts if axis == 1 else editor.call(aten.transpose.int, parts, 1, 2)
    return None


def _source_of_heads(editor: Editor, probe: Probe, x: fx.Node, axis: int) -> fx.Node | None:
    for source in movement_chain(x)[1:]:
        value = source.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() != 3 or value.numel() != value_of(x).numel():
            continue
        moved = probe.moved(x, source)
        if moved is None:
            return None
        ordered = moved if axis == 1 else moved.transpose(1, 2)  # [B, H, T, D]
        if torch.equal(ordered.transpose(1, 2).reshape(-1), torch.arange(moved.numel())):
            return source
    return None
