"""Lift the ends of a model: patch embedding from a strided convolution, and masked mean pooling."""

from __future__ import annotations

import torch
from torch import fx

from xformopt.kernels.definition import xf
from xformopt.lift.probe import Probe, is_movement, movement_chain, operator_name
from xformopt.program import value_of
from xformopt.rewrite import Editor, Reject

__all__ = ["lift_mean_pool", "lift_patch_embedding"]


def lift_patch_embedding(editor: Editor, node: fx.Node) -> fx.Node | Reject | None:
    """A convolution whose stride is its kernel, flattened to ``[B, T, C]``, becomes ``xf.patch_embedding``."""
    if not is_movement(node) or not isinstance(node.meta.get("val"), torch.Tensor) or value_of(node).dim() != 3:
        return None
    source = movement_chain(node)[-1]
    if operator_name(source) not in ("conv2d", "convolution", "_convolution"):
        return None
    image, weight = source.args[0], source.args[1]
    assert isinstance(image, fx.Node)
    assert isinstance(weight, fx.Node)
    if value_of(image).dim() != 4:
        return None
    moved = Probe(editor.program).moved(node, source)
    B, C, H, W = Probe(editor.program).shape(source)
    expected = torch.arange(B * C * H * W).view(B, C, H * W).transpose(1, 2)
    if moved is None or moved.shape != expected.shape or not torch.equal(moved, expected):
        return None
    if reason := _not_patches(source, tuple(value_of(weight).shape)):
        return Reject(reason)
    bias = source.args[2] if len(source.args) > 2 else None
    return editor.call(xf.patch_embedding, image, weight, bias)


def _not_patches(convolution: fx.Node, weight: tuple[int | torch.SymInt, ...]) -> str:
    names = ("stride", "padding", "dilation")
    values = dict(zip(names, convolution.args[3:6], strict=False)) | dict(convolution.kwargs)
    stride, padding, dilation = (values.get(name, default) for name, default in zip(names, (1, 0, 1), strict=True))
    groups = convolution.args[-1] if operator_name(convolution) == "convolution" else _groups(convolution)
    if _pair(stride) != tuple(weight[2:]):
        return f"the stride {_pair(stride)} is not the kernel size {tuple(weight[2:])}: patches overlap or leave gaps"
    if padding not in (0, [0, 0], [0], "valid") or _pair(dilation) != (1, 1) or groups != 1:
        return "the convolution pads, dilates or has groups"
    if operator_name(convolution) != "conv2d" and convolution.args[6]:
        return "the convolution is transposed"
    return ""


def _groups(convolution: fx.Node) -> object:
    return convolution.args[6] if len(convolution.args) > 6 else convolution.kwargs.get("groups", 1)


def _pair(value: object) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        return (value, value)
    return tuple(value) * (2 if len(value) == 1 else 1)


def lift_mean_pool(editor: Editor, node: fx.Node) -> fx.Node | None:
    """``sum(x * m, 1) / clamp(sum(m, 1), eps)`` with m a ``[B, T]`` mask spread over channels: ``xf.mean_pool``."""
    if operator_name(node) != "div":
        return None
    total, count = node.args
    if operator_name(total) != "sum" or operator_name(count) not in ("clamp", "clamp_min"):
        return None
    assert isinstance(total, fx.Node)
    assert isinstance(count, fx.Node)
    eps = count.args[1] if len(count.args) > 1 else count.kwargs.get("min")
    product, weights = total.args[0], count.args[0]
    if len(count.args) > 2 or count.kwargs.get("max") is not None:
        return None
    if not isinstance(eps, float | int) or operator_name(product) != "mul" or operator_name(weights) != "sum":
        return None
    if not all(_sums_tokens(part) for part in (total, weights)):  # type: ignore[arg-type]
        return None
    for x, spread in (product.args, product.args[::-1]):  # type: ignore[union-attr]
        if not isinstance(x, fx.Node) or not isinstance(spread, fx.Node) or value_of(x).dim() != 3:
            continue
        mask = _spread_mask(editor, spread)
        if mask is not None and _spread_mask(editor, weights.args[0]) is mask:  # type: ignore[union-attr, arg-type]
            return editor.call(xf.mean_pool, x, mask, eps=float(eps))
    return None


def _sums_tokens(node: fx.Node) -> bool:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if (len(node.args) > 2 and node.args[2]) or node.kwargs.get("keepdim"):
        return False
    return axes in ([1], 1, [-2]) and value_of(node.args[0]).dim() == 3  # type: ignore[arg-type]


def _spread_mask(editor: Editor, spread: fx.Node) -> fx.Node | None:
    """Return the ``[B, T]`` value that ``spread`` repeats along channels (casts between are skipped)."""
    node = spread
    while is_movement(node) or operator_name(node) in ("_to_copy", "to"):
        node = node.args[0]  # type: ignore[assignment]
    if not isinstance(node.meta.get("val"), torch.Tensor) or value_of(node).dim() != 2:
        return None
    probe = Probe(editor.program)
    known = probe.run(spread, {node: probe.positions(node).to(value_of(node).dtype)}, _moves_or_casts)
    if not isinstance(known, torch.Tensor) or value_of(node).dtype == torch.bool:
        return None
    expected = probe.positions(node).unsqueeze(-1).expand(known.shape)
    return node if torch.equal(known.long(), expected) else None


def _moves_or_casts(node: fx.Node) -> bool:
    return is_movement(node) or operator_name(node) in ("_to_copy", "to")
